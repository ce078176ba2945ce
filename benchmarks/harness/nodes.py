"""Nodes of one CPU rank each on loopback, which are killed and rejoin; the job may continue with fewer."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.harness.machine import ROOT
from benchmarks.harness.processes import ENVIRONMENT, OWN_STORE, Command
from benchmarks.harness.samples import Row, Rows
from benchmarks.jobs.counted import SLOW
from lightning_ckptless.ledger import Event, read_ledger
from lightning_ckptless.replica.arena import find_arenas

MAX_NODES = 4
RUN = "elastic"
SCRIPT = str(ROOT / "benchmarks" / "jobs" / "counted.py")
LOOK_S = 0.1
END_S = 300.0

T = TypeVar("T")


class NodesLostError(RuntimeError):
    """An awaited event did not occur."""


@dataclass(frozen=True)
class Bound:
    """How long a node may be silent before it is lost: heartbeats that may be missing, seconds between two.

    The rendezvous waits `last_call_s` for another node.
    """

    interval_s: int = 1
    attempts: int = 4
    last_call_s: int = 1

    @property
    def conf(self) -> str:
        """Settings for `--rdzv-conf`."""
        return (
            f"keep_alive_interval={self.interval_s},keep_alive_max_attempt={self.attempts},"
            f"last_call_timeout={self.last_call_s}"
        )


@dataclass(frozen=True)
class Setup:
    """How a job continues with fewer nodes.

    Args:
        name: name in the tables.
        words: arguments of the script.
        flags: flags of `ckptless run`.
        checkpoint_every: steps between two checkpoint files of torchrun with Lightning's ddp; 0 for our strategy.
        sharded: whether the model is sharded by FSDP2.
    """

    name: str
    words: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    checkpoint_every: int = 0
    sharded: bool = False

    def script(self, folder: Path, nodes: int, devices: int, *size: str) -> list[str]:
        """Return the script and its arguments."""
        words = [*self.words, *(("--sharded",) if self.sharded else ()), f"--checkpoint-every={self.checkpoint_every}"]
        return [SCRIPT, f"--folder={folder}", f"--nodes={nodes}", f"--devices={devices}", *words, *size]


def our_launcher(folder: Path, arenas: Path) -> list[str]:
    return [sys.executable, "-m", "lightning_ckptless.runner", f"--run-root={folder / 'runs'}", f"--arena-dir={arenas}"]


class Nodes:
    """The nodes of a job. A context manager that ends all of them on exit.

    Args:
        setup: how the job continues without a node.
        folder: empty folder for everything that the job writes.
        arenas: folder in shared memory.
        size: options of the script that say how much it trains.
        bound: how long a node may be silent; None for our defaults.
    """

    def __init__(
        self, setup: Setup, folder: Path, arenas: Path, size: tuple[str, ...], bound: Bound | None = None
    ) -> None:
        self.setup, self.folder, self.arenas, self.size, self.bound = setup, folder, arenas, size, bound
        self.seen = Rows(folder)
        self._meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._stack = ExitStack()
        self._nodes: dict[int, Command] = {}
        self._started = 0

    def start(self, number: int) -> float:
        """Start a node; ranks are in the order of nodes. Returns the wall clock time of the start."""
        folder = self.folder / f"node-{self._started}"
        folder.mkdir()
        self._started += 1
        env = ENVIRONMENT | (OWN_STORE if self.setup.checkpoint_every else {})
        self._nodes[number] = node = self._stack.enter_context(Command(self._command(number), folder, env))
        return node.began_at

    def _command(self, number: int) -> list[str]:
        theirs = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--max-restarts=100"]
        ours = [*our_launcher(self.folder, self.arenas), *self.setup.flags]
        # The benchmark itself hosts the rendezvous, so that any node may be lost.
        conf = ",".join(["is_host=no", *([] if self.bound is None else [self.bound.conf])])
        return [
            *(theirs if self.setup.checkpoint_every else ours),
            f"--nnodes={MAX_NODES - 1}:{MAX_NODES}", "--nproc-per-node=1", f"--rdzv-id={RUN}",
            f"--rdzv-endpoint=127.0.0.1:{self._meeting.port}", f"--rdzv-conf={conf}",
            f"--local-addr=127.0.0.{number + 1}", *self.setup.script(self.folder, MAX_NODES, 1, *self.size),
        ]  # fmt: skip

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
        while (found := reached(self.seen.look())) is None:
            if time.monotonic() > deadline:
                raise NodesLostError(f"{awaited} not reached within {timeout_s:g} s:\n{self.output_tail()}")
            if not all(node.running for node in self._nodes.values()):
                raise NodesLostError(f"a node ended before this was reached: {awaited}:\n{self.output_tail()}")
            time.sleep(LOOK_S)
        return found

    def wait(self) -> None:
        """Wait until all nodes have ended successfully.

        Raises:
            NodesLostError: If one has failed.
        """
        codes = [node.wait(END_S) for node in self._nodes.values()]
        if any(codes):
            raise NodesLostError(f"the nodes ended with exit codes {codes}:\n{self.output_tail()}")

    def events(self) -> tuple[Event, ...]:
        """Return the events of the ledger."""
        return read_ledger(self.folder / "runs" / RUN / "ledger.jsonl").events

    def output_tail(self) -> str:
        return "\n".join(f"node {number}:\n{node.output_tail(6)}" for number, node in self._nodes.items())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def run_undisturbed(setup: Setup, folder: Path, arenas: Path, size: tuple[str, ...]) -> None:
    """Run the same training undisturbed, with four ranks on one node.

    Raises:
        NodesLostError: If it fails.
    """
    script = setup.script(folder, 1, MAX_NODES, *size)
    with Command([*our_launcher(folder, arenas), f"--nproc-per-node={MAX_NODES}", *script], folder, ENVIRONMENT) as run:
        if code := run.wait(END_S):
            raise NodesLostError(f"the undisturbed run ended with exit code {code}:\n{run.output_tail()}")
