"""The members of a run: where each rank is, by the progress that its worker writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.cli.survey.history import Node
from lightning_ckptless.cli.survey.reading import NodeReading, Reading
from lightning_ckptless.membership.worker.progress import WorkerProgress
from lightning_ckptless.protocol.hang_detection import Point


class ProcessState(StrEnum):
    """The state of a rank's process. `ELSEWHERE` is a process on another host, which cannot be seen from here."""

    RUNNING = "running"
    STOPPED = "stopped"
    TRACED = "traced"
    EXITED = "exited"
    ELSEWHERE = "elsewhere"


_STATES = {
    "T": ProcessState.STOPPED,
    "t": ProcessState.TRACED,
    "X": ProcessState.EXITED,
    "Z": ProcessState.EXITED,
}
"""By the letter of `/proc/PID/stat`; all others run."""


@dataclass(frozen=True, slots=True)
class Member:
    """One rank.

    Args:
        rank: its rank.
        node: name of its node.
        pid: process id of its newest worker.
        state: state of this process: running, stopped (by a signal), traced (by a debugger), exited, or elsewhere (on
            another host).
        step: optimizer step that it has begun; None if it has written no progress, or trains no step.
        point: where it is in the step: `outside`, `restore`, `batch`, `backward`, `optimizer`, `commit` or
            `validation`; empty if it has written no progress.
        progress_age_s: seconds since its last sign of progress; None if it has written none.
        step_s: its own time per step in seconds, without waiting for other ranks; None if unknown.
    """

    rank: int
    node: str
    pid: int
    state: str
    step: int | None
    point: str
    progress_age_s: float | None
    step_s: float | None


def members_of(reading: Reading) -> tuple[Member, ...]:
    """Return all ranks, in order."""
    found: list[Member] = []
    for node in _current_nodes(reading):
        here = reading.nodes.get(node.name)
        if here is None:
            found += [_elsewhere(rank, node.name, pid) for rank, pid in node.pids.items()]
        else:
            found += _on(node, here, reading.clock_s)
    return tuple(sorted(found, key=lambda member: member.rank))


def _current_nodes(reading: Reading) -> Iterator[Node]:
    """Yield the nodes of the newest placement, and those whose workers were started after it."""
    placed = reading.history.newest.get("placement")
    for node in reading.history.nodes.values():
        if placed is None or node.spawned_at >= placed.at or node.name in placed.fields["nodes"]:
            yield node


def _on(node: Node, here: NodeReading, clock_s: float) -> Iterator[Member]:
    """Yield the ranks of a node on this host."""
    by_pid = {worker.pid: worker for worker in here.workers}
    for rank, pid in node.pids.items():
        worker, state = by_pid.get(pid), _STATES.get(here.states[pid], ProcessState.RUNNING)
        if worker is None:
            yield Member(rank, node.name, pid, state, None, "", None, None)
        else:
            yield _with_progress(worker, node.name, state, clock_s)


def _with_progress(worker: WorkerProgress, node: str, state: ProcessState, clock_s: float) -> Member:
    progress = worker.progress
    return Member(
        rank=worker.rank,
        node=node,
        pid=worker.pid,
        state=state,
        step=progress.step if progress.step > 0 else None,
        point=Point(progress.point).name.lower(),
        progress_age_s=max(0.0, clock_s - progress.at),
        step_s=progress.own_s or None,
    )


def _elsewhere(rank: int, node: str, pid: int) -> Member:
    return Member(rank, node, pid, ProcessState.ELSEWHERE, None, "", None, None)
