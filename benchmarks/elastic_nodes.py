"""Nodes of one CPU rank each on loopback, that are killed and come back; the job may go on with fewer."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.elastic_job import SLOW
from benchmarks.machine import ROOT
from benchmarks.processes import OWN_STORE, Command
from benchmarks.samples import Row, Rows
from lightning_ckptless.ledger import Event, read_ledger
from lightning_ckptless.replica.arena import find_arenas

MOST = 4
RUN = "elastic"
SCRIPT = ROOT / "benchmarks" / "elastic_job.py"
LOOK_S = 0.1
END_S = 300.0

T = TypeVar("T")


class NodesLostError(RuntimeError):
    """What was waited for did not come."""


@dataclass(frozen=True)
class Bound:
    """How long the silence of a node is borne.

    Args:
        interval_s: from one heartbeat to the next.
        attempts: heartbeats that may be missing.
        last_call_s: for how long those that meet wait for another one.
    """

    interval_s: int = 1
    attempts: int = 4
    last_call_s: int = 1

    @property
    def conf(self) -> str:
        """For `--rdzv-conf`; the benchmark itself hosts the rendezvous, so that any node may be lost."""
        return (
            f"is_host=no,keep_alive_interval={self.interval_s},keep_alive_max_attempt={self.attempts},"
            f"last_call_timeout={self.last_call_s}"
        )


@dataclass(frozen=True)
class Way:
    """A way to go on with fewer nodes.

    Args:
        name: what the tables call it.
        words: of the script.
        flags: of `ckptless run`.
        checkpoint_every: steps between two checkpoint files of torchrun with Lightning's ddp; 0 for our strategy.
        sharded: by FSDP2.
    """

    name: str
    words: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    checkpoint_every: int = 0
    sharded: bool = False

    def script(self, folder: Path, nodes: int, devices: int, *size: str) -> list[str]:
        """Script and arguments."""
        words = [*self.words, *(("--sharded",) if self.sharded else ()), f"--checkpoint-every={self.checkpoint_every}"]
        return [str(SCRIPT), f"--folder={folder}", f"--nodes={nodes}", f"--devices={devices}", *words, *size]


class Nodes:
    """The nodes of a job. A context manager that ends all of them.

    Args:
        way: how the job goes on.
        folder: for all that the job writes; empty.
        arenas: folder of the shared memory.
        size: options of the script: how much it trains.
        bound: how long silence is borne.
    """

    def __init__(self, way: Way, folder: Path, arenas: Path, size: tuple[str, ...], bound: Bound) -> None:
        self.way, self.folder, self.arenas, self.size, self.bound = way, folder, arenas, size, bound
        self.seen = Rows(folder)
        self._meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._stack = ExitStack()
        self._nodes: dict[int, Command] = {}
        self._started = 0

    def start(self, number: int) -> float:
        """Start a node; ranks are in the order of nodes. Returns when, by the wall clock."""
        folder = self.folder / f"node-{self._started}"
        folder.mkdir()
        self._started += 1
        env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        env |= OWN_STORE if self.way.checkpoint_every else {}
        self._nodes[number] = node = self._stack.enter_context(Command(self._command(number), folder, env))
        return node.began_at

    def _command(self, number: int) -> list[str]:
        ours = ["lightning_ckptless.runner", f"--run-root={self.folder / 'runs'}", f"--arena-dir={self.arenas}"]
        theirs = ["torch.distributed.run", "--rdzv-backend=c10d", "--max-restarts=100"]
        return [
            sys.executable, "-m", *(theirs if self.way.checkpoint_every else [*ours, *self.way.flags]),
            f"--nnodes={MOST - 1}:{MOST}", "--nproc-per-node=1", f"--rdzv-id={RUN}",
            f"--rdzv-endpoint=127.0.0.1:{self._meeting.port}", f"--rdzv-conf={self.bound.conf}",
            f"--local-addr=127.0.0.{number + 1}", *self.way.script(self.folder, MOST, 1, *self.size),
        ]  # fmt: skip

    def kill(self, number: int) -> float:
        """SIGKILL a node's agent and its workers, and take its shared memory away. Returns when."""
        node = self._nodes.pop(number)
        killed_at = time.time()
        node.kill()
        for info in find_arenas(self.arenas):
            if info.owner.pid == node.pid:
                shutil.rmtree(info.path)
        return killed_at

    def slow_down(self) -> float:
        """Make steps take longer, so that who comes finds the job running. Returns from when on."""
        (self.folder / SLOW).touch()
        return time.time()

    def speed_up(self) -> None:
        """The opposite."""
        (self.folder / SLOW).unlink(missing_ok=True)

    def until(self, reached: Callable[[list[Row]], T | None], timeout_s: float, awaited: str) -> T:
        """Follow the job until it has got somewhere.

        Raises:
            NodesLostError: it has not in time, or a node has ended.
        """
        deadline = time.monotonic() + timeout_s
        while (found := reached(self.seen.look())) is None:
            if time.monotonic() > deadline:
                raise NodesLostError(f"no sign of {awaited} within {timeout_s:g} s:\n{self.last_words()}")
            if not all(node.running for node in self._nodes.values()):
                raise NodesLostError(f"a node ended before {awaited}:\n{self.last_words()}")
            time.sleep(LOOK_S)
        return found

    def wait(self) -> None:
        """Until all nodes have ended well.

        Raises:
            NodesLostError: one has not.
        """
        codes = [node.wait(END_S) for node in self._nodes.values()]
        if any(codes):
            raise NodesLostError(f"the nodes ended with exit codes {codes}:\n{self.last_words()}")

    def events(self) -> tuple[Event, ...]:
        """What the ledger says."""
        return read_ledger(self.folder / "runs" / RUN / "ledger.jsonl").events

    def last_words(self) -> str:
        """The end of what each node has printed."""
        return "\n".join(f"node {number}:\n{node.last_words(6)}" for number, node in self._nodes.items())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def left_alone(way: Way, folder: Path, arenas: Path, size: tuple[str, ...]) -> None:
    """Run the same with four ranks on one node, which nobody kills.

    Raises:
        NodesLostError: it did not end well.
    """
    words: list[Any] = [sys.executable, "-m", "lightning_ckptless.runner", f"--run-root={folder / 'runs'}"]
    words += [f"--arena-dir={arenas}", f"--nproc-per-node={MOST}", *way.script(folder, 1, MOST, *size)]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with Command(words, folder, env) as command:
        if code := command.wait(END_S):
            raise NodesLostError(f"the run that nobody kills ended with exit code {code}:\n{command.last_words()}")
