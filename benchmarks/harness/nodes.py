"""Nodes of one CPU rank each on loopback, which are killed and rejoin; the job may continue with fewer."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self, TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.harness.processes import OWN_STORE, Command, Scratch, ckptless_run, job_environment, torch_run
from benchmarks.harness.samples import Row
from benchmarks.harness.wire import Inbox
from benchmarks.jobs.counted import SLOW
from benchmarks.jobs.job import JobOptions
from lightning_ckptless import environment
from lightning_ckptless.replica.arena import find_arenas

MAX_NODES = 4
LOOK_S = 0.1
END_S = 300.0
SILENCE_S = (1, 4)
"""Of torchrun's agents: seconds between two keep-alives, and how many may be missing; our agents have their own."""

T = TypeVar("T")


class NodesLostError(RuntimeError):
    """An awaited event did not occur."""


@dataclass(frozen=True)
class Setup:
    """How a job continues with fewer nodes.

    Args:
        name: name in the tables.
        job: what is trained on each node, with our strategy or with Lightning's ddp.
        flags: flags of `ckptless run`.
    """

    name: str
    job: JobOptions
    flags: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        return self.job.strategy == "ckptless"


class Nodes:
    """The nodes of a job. A context manager that ends all of them on exit.

    Args:
        setup: what the nodes run.
        place: folders of the benchmark.
        name: name of the job's folder.

    Attributes:
        folder: folder for everything that the job writes.
        rows: steps that the ranks have finished so far.
    """

    def __init__(self, setup: Setup, place: Scratch, name: str) -> None:
        self.setup, self.arenas, self.folder = setup, place.arenas, place.files / name
        self.folder.mkdir()
        self.rows: list[Row] = []
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
        places = {environment.RUN_ROOT: str(self.folder / "runs"), environment.ARENA_DIR: str(self.arenas)}
        env = {**job_environment(self._inbox.path), **(places if self.setup.is_ours else OWN_STORE)}
        self._nodes[number] = node = self._stack.enter_context(Command(self._command(number), folder, env))
        return node.began_at

    def _command(self, number: int) -> list[str]:
        # The benchmark itself hosts the rendezvous, so that any node may be lost.
        interval_s, attempts = SILENCE_S
        theirs = f",keep_alive_interval={interval_s},keep_alive_max_attempt={attempts},last_call_timeout=1"
        flags = (
            f"--nnodes={MAX_NODES - 1}:{MAX_NODES}", "--rdzv-backend=c10d", "--rdzv-id=elastic",
            f"--rdzv-endpoint=127.0.0.1:{self._meeting.port}",
            f"--rdzv-conf=is_host=no{'' if self.setup.is_ours else theirs}", f"--local-addr=127.0.0.{number + 1}",
        )  # fmt: skip
        launcher = ckptless_run(*flags, *self.setup.flags) if self.setup.is_ours else torch_run(*flags)
        return launcher(self.setup.job.but(nodes=MAX_NODES, devices=1, root=str(self.folder)))

    def kill(self, number: int) -> float:
        """SIGKILL a node's agent and its workers, and remove its shared memory. Returns the wall clock time."""
        node = self._nodes.pop(number)
        killed_at = time.time()
        node.kill()
        for info in find_arenas(self.arenas):
            if info.owner.pid == node.pid:
                shutil.rmtree(info.path)
        return killed_at

    def slow_down(self) -> float:
        """Make steps take longer, so that a new node finds the job running. Returns the wall clock time."""
        (self.folder / SLOW).touch()
        return time.time()

    def speed_up(self) -> None:
        """End the slowdown."""
        (self.folder / SLOW).unlink(missing_ok=True)

    def until(self, reached: Callable[[list[Row]], T | None], timeout_s: float, awaited: str) -> T:
        """Follow the job until `reached` returns a value.

        Raises:
            NodesLostError: If it does not in time, or a node has ended.
        """
        deadline = time.monotonic() + timeout_s
        while (found := reached(self.rows)) is None:
            if time.monotonic() > deadline:
                raise NodesLostError(f"{awaited} not reached within {timeout_s:g} s:\n{self.output_tail()}")
            if not all(node.running for node in self._nodes.values()):
                raise NodesLostError(f"a node ended before this was reached: {awaited}:\n{self.output_tail()}")
            self._look(LOOK_S)
        return found

    def _look(self, timeout_s: float) -> None:
        """Take all notes that arrive within a time."""
        deadline = time.monotonic() + timeout_s
        while (note := self._inbox.next(max(0.0, deadline - time.monotonic()))) is not None:
            if note.moment == "counted":
                self.rows.append(Row(at=note.at, **note.fields))

    def wait(self) -> None:
        """Follow the job until all nodes have ended successfully.

        Raises:
            NodesLostError: If one has failed.
        """
        deadline = time.monotonic() + END_S
        while any(node.running for node in self._nodes.values()) and time.monotonic() < deadline:
            self._look(LOOK_S)
        codes = [node.wait(LOOK_S) for node in self._nodes.values()]
        self._look(LOOK_S)
        if any(codes):
            raise NodesLostError(f"the nodes ended with exit codes {codes}:\n{self.output_tail()}")

    def output_tail(self) -> str:
        return "\n".join(f"node {number}:\n{node.output_tail(6)}" for number, node in self._nodes.items())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
