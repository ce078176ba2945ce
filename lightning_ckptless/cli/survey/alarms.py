"""What is wrong with a run now: which rank or node, and why.

An alarm ends when its condition ends. Each kind has one rule:

| Kind | Condition |
|---|---|
| `killed`, `exited`, `hung`, `lost` | an agent has reported this fault of a worker, and no step was committed since |
| `raised` | the script has raised an exception on a rank, and no step was committed since |
| `node_lost` | another node has fallen silent, and no step was committed since |
| `gone` | the process of a rank no longer exists, and how it has ended is not known, or not yet |
| `stopped` | a signal has stopped the process of a rank |
| `traced` | a debugger holds the process of a rank |
| `behind` | no rank makes progress, and the others wait for this one |
| `straggler` | a rank's own time per step is 1.5 times the median of the others, or more, and 10 ms longer |
| `agent_exited` | the agent of a node no longer exists, and the run has not ended |
| `uncovered` | some shard has no copy in another failure domain, though the placement wants one |
| `disk_full` | no space is left where the ledger is |
| `ledger_stale` | versions are committed, and the ledger has not recorded one for 5 s |
| `durable_failed` | the last durable state that was due could not be written |
| `standbys` | fewer standbys are ready than wanted |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lightning_ckptless.cli.survey.history import History
from lightning_ckptless.cli.survey.members import Member, ProcessState
from lightning_ckptless.cli.survey.protection import Protected
from lightning_ckptless.cli.survey.reading import Reading
from lightning_ckptless.ledger import Event
from lightning_ckptless.protocol.hang_detection import RankProgress, find_hang
from lightning_ckptless.protocol.stragglers import find_straggler

LEAST_SILENCE_S = 0.4
"""Without progress on any rank, before one is shown as behind."""
SILENCE_FACTOR = 2.0
"""The same, as a multiple of the longest pause seen between two signs of progress."""
STALE_S = 5.0


class AlarmKind(StrEnum):
    """The kinds of alarms; see the table above."""

    KILLED = "killed"
    EXITED = "exited"
    HUNG = "hung"
    LOST = "lost"
    RAISED = "raised"
    NODE_LOST = "node_lost"
    GONE = "gone"
    STOPPED = "stopped"
    TRACED = "traced"
    BEHIND = "behind"
    STRAGGLER = "straggler"
    AGENT_EXITED = "agent_exited"
    UNCOVERED = "uncovered"
    DISK_FULL = "disk_full"
    LEDGER_STALE = "ledger_stale"
    DURABLE_FAILED = "durable_failed"
    STANDBYS = "standbys"


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that is wrong now.

    Args:
        kind: see the table of alarms.
        rank: rank that causes it; None if no single rank does.
        node: name of its node; empty if no single node causes it.
        text: what is wrong, one sentence.
    """

    kind: str
    rank: int | None
    node: str
    text: str


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that the ledger reports.

    Args:
        kind: `killed`, `exited`, `gone`, `hung`, `lost`, `raised` or `node_lost`.
        rank: rank that failed; None if no worker of the reporting node did.
        node: name of the node that reports it; empty if a worker does.
        text: what happened, one sentence.
        at: when it happened, in seconds since the epoch.
        is_over: whether a step has been committed since.
    """

    kind: str
    rank: int | None
    node: str
    text: str
    at: float
    is_over: bool


def faults_of(history: History, most: int) -> tuple[Fault, ...]:
    """Return the last faults, the newest last."""
    steps = [history.newest[name].at for name in ("committed", "recovery", "run_ended") if name in history.newest]
    return tuple(_fault(event, max(steps, default=0.0)) for event in list(history.faults)[-most:])


def _fault(event: Event, stepped_at: float) -> Fault:
    fields, node = event.fields, str(event.fields.get("node") or "")
    if event.event == "raised":
        final = "; it is final" if fields["final"] else ""
        text = f"rank {event.rank} raised {fields['cause']}{final}"
        return Fault(AlarmKind.RAISED, event.rank, "", text, event.at, stepped_at > event.at)
    if event.event == "node_lost":
        return Fault(AlarmKind.NODE_LOST, None, node, fields["reason"], event.at, stepped_at > event.at)
    rank = event.rank
    at = fields.get("died_at") or event.at
    return Fault(_kind(rank, fields), rank, node, _cause(rank, fields), at, stepped_at > event.at)


def _kind(rank: int | None, fields: dict[str, Any]) -> AlarmKind:
    kind = fields.get("kind")
    if rank is not None and not fields.get("hung") and not _end(fields):
        return AlarmKind.GONE
    return AlarmKind(kind) if kind in {"killed", "exited", "hung", "lost"} else AlarmKind.LOST


def _cause(rank: int | None, fields: dict[str, Any]) -> str:
    if rank is None:
        return "the members of the run changed"
    if fields.get("hung"):
        return f"rank {rank} hung: {fields['hung']}"
    how = _end(fields) or "has left, and its agent does not know its exit code"
    memory = f" ({fields['out_of_memory']})" if fields.get("out_of_memory") else ""
    return f"rank {rank} {how}{memory}"


def _end(fields: dict[str, Any]) -> str:
    """How a process has ended; empty if its agent does not know."""
    if (code := fields.get("exit_code")) is not None:
        return f"exited with code {code}"
    return f"died by {fields['signal_name']}" if fields.get("signal_name") else ""


def alarms_of(
    reading: Reading, members: Sequence[Member], faults: Sequence[Fault], protected: Protected, state: str
) -> tuple[Alarm, ...]:
    """Decide what is wrong now, the most urgent first.

    Args:
        reading: what was read.
        members: its ranks.
        faults: the last faults.
        protected: which losses it survives.
        state: state of the run.
    """
    if state == "ended":
        return ()
    found = [
        *_agents(reading),
        *(Alarm(fault.kind, fault.rank, fault.node, fault.text) for fault in faults if not fault.is_over),
        *_processes(reading, members),
        *_behind(reading),
        *_stragglers(members),
        *_storage(reading, protected),
        *_standbys(reading.history),
    ]
    return tuple(dict.fromkeys(found))


def _agents(reading: Reading) -> Iterator[Alarm]:
    for name, node in reading.nodes.items():
        if not node.agent_alive:
            pid = reading.history.nodes[name].agent
            text = f"the agent of node {name} (pid {pid}) has exited, and its workers end with it"
            yield Alarm(AlarmKind.AGENT_EXITED, None, name, text)


def _processes(reading: Reading, members: Sequence[Member]) -> Iterator[Alarm]:
    for member in members:
        if member.node in reading.nodes and not reading.nodes[member.node].agent_alive:
            # The loss of its agent explains the state of its workers.
            continue
        who = f"rank {member.rank} (pid {member.pid})"
        match member.state:
            case ProcessState.EXITED:
                yield Alarm(AlarmKind.GONE, member.rank, member.node, f"the process of {who} has exited")
            case ProcessState.STOPPED:
                yield Alarm(AlarmKind.STOPPED, member.rank, member.node, f"a signal has stopped {who}")
            case ProcessState.TRACED:
                yield Alarm(AlarmKind.TRACED, member.rank, member.node, f"a debugger holds {who}")


def _behind(reading: Reading) -> Iterator[Alarm]:
    """Yield the ranks that the others wait for, long before the agent counts them as hung."""
    workers = {
        worker.rank: (name, worker)
        for name, node in reading.nodes.items()
        for worker in node.workers
        if worker.is_running and worker.pid in node.states
    }
    progress = {rank: worker.progress for rank, (_, worker) in workers.items()}
    hang = find_hang(progress, now=reading.clock_s, override_s=_silence_s(progress))
    if hang is None or len(hang.ranks) == len(progress):
        return
    for rank in hang.ranks:
        found = progress[rank]
        if found.stopped:
            continue
        where = f"{found.point.name.lower()} of step {found.step}" if found.step else found.point.name.lower()
        text = f"the other ranks wait for rank {rank}, which is at {where} for {reading.clock_s - found.at:.1f} s"
        yield Alarm(AlarmKind.BEHIND, rank, workers[rank][0], text)


def _silence_s(progress: dict[int, RankProgress]) -> float:
    longest_s = max((found.longest_pause_s for found in progress.values()), default=0.0)
    return max(LEAST_SILENCE_S, SILENCE_FACTOR * longest_s)


def _stragglers(members: Sequence[Member]) -> Iterator[Alarm]:
    by_rank = {member.rank: member for member in members}
    own_s = {rank: member.step_s or 0.0 for rank, member in by_rank.items()}
    if (found := find_straggler(own_s)) is not None:
        yield Alarm(AlarmKind.STRAGGLER, found.rank, by_rank[found.rank].node, f"rank {found.rank} {found}")


def _storage(reading: Reading, protected: Protected) -> Iterator[Alarm]:
    history = reading.history
    placed, committed = history.newest.get("placement"), history.newest.get("committed")
    if placed is not None and placed.fields["copies"] and protected.losses == 0:
        yield Alarm(AlarmKind.UNCOVERED, None, "", protected.text)
    if not reading.free_bytes:
        text = f"{reading.folder}: the disk is full; the run continues without recording it"
        yield Alarm(AlarmKind.DISK_FULL, None, "", text)
    newest_at = max(reading.replicas.values(), default=0.0)
    if committed is not None and reading.at - newest_at < STALE_S and newest_at - committed.at > STALE_S:
        silent_s = reading.at - committed.at
        text = f"the ledger has recorded no version for {silent_s:.0f} s, though versions are committed"
        yield Alarm(AlarmKind.LEDGER_STALE, None, "", text)
    if history.is_newest("durable_failed", "durable_written"):
        fields = history.newest["durable_failed"].fields
        text = f"the durable state of step {fields['step']} could not be written: {fields.get('cause') or 'unknown'}"
        yield Alarm(AlarmKind.DURABLE_FAILED, None, "", text)


def _standbys(history: History) -> Iterator[Alarm]:
    event = history.newest.get("standbys")
    if event is not None and event.fields["ready"] < event.fields["wanted"]:
        ready, wanted = event.fields["ready"], event.fields["wanted"]
        yield Alarm(AlarmKind.STANDBYS, None, "", f"{ready} of {wanted} standbys are ready")
