"""Nodes of one CPU rank each on loopback, which are killed and rejoin; the job may continue with fewer."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.harness.processes import Command, Scratch, ckptless_run, job_environment
from benchmarks.harness.wire import Inbox
from benchmarks.jobs.job import JobOptions
from lightning_ckptless import environment
from lightning_ckptless.replica.arena import find_arenas

MAX_NODES = 4
LOOK_S = 0.1

T = TypeVar("T")


class NodesLostError(RuntimeError):
    """An awaited event did not occur."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step that all ranks of its world have finished, and when the last of them did."""

    attempt: int
    number: int
    world: int
    at: float


def finished(rows: Iterable[dict[str, Any]]) -> list[Step]:
    """Return the steps that all ranks of their world have finished, by time; replayed steps occur twice."""
    ranks: dict[tuple[int, int, int], dict[int, float]] = {}
    for row in rows:
        ranks.setdefault((row["attempt"], row["step"], row["world"]), {})[row["rank"]] = row["at"]
    whole = [Step(*key, max(at.values())) for key, at in ranks.items() if len(at) == key[2]]
    return sorted(whole, key=lambda step: step.at)


def first_of(steps: Sequence[Step], world: int, *, after: float) -> Step | None:
    """Return the first step that `world` ranks finished after a moment."""
    return next((step for step in steps if step.world == world and step.at > after), None)


class Nodes:
    """The nodes of a job. A context manager that ends all of them on exit.

    Args:
        job: what they train.
        flags: flags of `ckptless run`.
        place: folders of the benchmark.
        name: name of the job's folder.

    Attributes:
        folder: folder for everything that the job writes.
    """

    def __init__(self, job: JobOptions, flags: Sequence[str], place: Scratch, name: str) -> None:
        self.folder = place.files / name
        self.folder.mkdir()
        self._job = job.but(nodes=MAX_NODES, devices=1, root=str(self.folder))
        self._flags, self._arenas = flags, place.arenas
        self._rows: list[dict[str, Any]] = []
        self._meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._stack = ExitStack()
        self._inbox = self._stack.enter_context(Inbox(place.files / f"{name}.socket"))
        self._nodes: dict[int, Command] = {}
        self._started = 0

    def start(self, number: int) -> float:
        """Start a node; ranks are in the order of nodes. Returns the wall clock time of the start."""
        folder = self.folder / f"node-{self._started}"
        folder.mkdir()
        self._started += 1
        # The benchmark itself hosts the rendezvous, so that any node may be lost.
        launcher = ckptless_run(
            f"--nnodes={MAX_NODES - 1}:{MAX_NODES}", "--rdzv-id=elastic", "--rdzv-conf=is_host=no",
            f"--rdzv-endpoint=127.0.0.1:{self._meeting.port}", f"--local-addr=127.0.0.{number + 1}", *self._flags,
        )  # fmt: skip
        places = {environment.RUN_ROOT: str(self.folder / "runs"), environment.ARENA_DIR: str(self._arenas)}
        node = Command(launcher(self._job), folder, {**job_environment(self._inbox.path), **places})
        self._nodes[number] = self._stack.enter_context(node)
        return node.began_at

    def kill(self, number: int) -> float:
        """SIGKILL a node's agent and its workers, and remove its shared memory. Returns the wall clock time."""
        node = self._nodes.pop(number)
        killed_at = time.time()
        node.kill()
        for info in find_arenas(self._arenas):
            if info.owner.pid == node.pid:
                shutil.rmtree(info.path)
        return killed_at

    @property
    def steps(self) -> list[Step]:
        """The steps that all ranks have finished so far."""
        return finished(self._rows)

    def until(self, reached: Callable[[list[Step]], T | None], timeout_s: float, awaited: str) -> T:
        """Follow the job until `reached` returns a value.

        Raises:
            NodesLostError: If it does not in time, or a node has ended.
        """
        deadline = time.monotonic() + timeout_s
        while (found := reached(self.steps)) is None:
            if time.monotonic() > deadline:
                raise NodesLostError(f"{awaited} not reached within {timeout_s:g} s:\n{self.output_tail()}")
            if not all(node.running for node in self._nodes.values()):
                raise NodesLostError(f"a node ended before this was reached: {awaited}:\n{self.output_tail()}")
            look_until = time.monotonic() + LOOK_S
            while (note := self._inbox.next(max(0.0, look_until - time.monotonic()))) is not None:
                if note.moment == "step":
                    self._rows.append({"at": note.at, **note.fields})
        return found

    def output_tail(self) -> str:
        return "\n".join(f"node {number}:\n{node.output_tail(6)}" for number, node in self._nodes.items())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
