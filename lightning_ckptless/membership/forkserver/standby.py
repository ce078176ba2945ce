"""Standbys: processes that have run the script up to `fit` and wait there for a rank.

They are started once training is under way, and replaced when used. One that exits before it is ready is restarted
twice; then the run continues without standbys and logs that.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lightning_ckptless.membership.events import Report, StandbysExited
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.rendezvous.regrouping import Regrouping
from lightning_ckptless.protocol.messages import AssignRank, StandbyReady

_TRIES = 3
_LAST_WORDS_BYTES = 600
_KILL_WAIT_S = 10.0

Start = Callable[[list[int]], Process]
"""Starts a standby, given its stdin, stdout and stderr."""


class Standbys:
    """The standbys of one node.

    Args:
        count: how many to keep ready.
        start: starts one.
        folder: folder for their output until they have a rank.
        report: receives events.

    Attributes:
        count: how many to keep ready.
    """

    def __init__(self, count: int, start: Start, folder: Path, report: Report) -> None:
        self.count = count
        self._start = start
        self._folder = folder
        self._report = report
        self._waiting: list[Process] = []
        self._dying: list[Process] = []
        self._coming: dict[int, tuple[Process, Path]] = {}
        self._outputs: dict[int, Path] = {}
        self._begun = 0
        self._failures = 0

    @property
    def ready(self) -> int:
        """Number of standbys that wait for a rank."""
        return len(self._waiting)

    @property
    def have_given_up(self) -> bool:
        """Whether no more are started, because several exited before they were ready."""
        return self._failures >= _TRIES

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of all standbys, ready or not."""
        return (*(process.pid for process in self._waiting), *self._coming)

    def maintain(self) -> bool:
        """Start missing standbys, and notice which are ready or have exited. Returns whether anything has changed."""
        before = self.pids, self.ready
        self._waiting = [process for process in self._waiting if not _has_exited(process)]
        self._dying = [process for process in self._dying if not _has_exited(process)]
        for pid, (process, output) in list(self._coming.items()):
            if any(isinstance(received.message, StandbyReady) for received in process.channel.poll()):
                self._waiting.append(process)
                del self._coming[pid]
            elif _has_exited(process):
                del self._coming[pid]
                self._count_failure(output)
        while self._failures < _TRIES and self.ready + len(self._coming) < self.count:
            self._begin()
        return before != (self.pids, self.ready)

    def _begin(self) -> None:
        output = self._folder / f"standby-{self._begun}.log"
        self._begun += 1
        number = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            process = self._start([0, number, number])
        finally:
            os.close(number)
        self._coming[process.pid] = process, output
        self._outputs[process.pid] = output

    def _count_failure(self, output: Path) -> None:
        self._failures += 1
        if self._failures == _TRIES:
            said = output.read_bytes()[-_LAST_WORDS_BYTES:].decode(errors="replace").strip()
            self._report(StandbysExited(_TRIES, said))

    def take(self) -> Process | None:
        """Take a standby that waits for a rank; None if there is none."""
        while self._waiting:
            process = self._waiting.pop(0)
            if process.is_dying():
                # Its resources are released when it exits.
                self._dying.append(process)
            elif not _has_exited(process):
                return process
        return None

    def output_of(self, process: Process) -> Path:
        """File with the output of a standby until it has joined the other ranks."""
        return self._outputs[process.pid]

    def stop(self) -> None:
        """Kill all standbys."""
        processes = [*self._waiting, *self._dying, *(process for process, _ in self._coming.values())]
        for process in processes:
            process.signal(signal.SIGKILL)
        for process in processes:
            process.leave(_KILL_WAIT_S)
        self._waiting.clear()
        self._dying.clear()
        self._coming.clear()


def _has_exited(process: Process) -> bool:
    if process.has_ended():
        process.channel.close()
        return True
    return False


def promote(process: Process, env: dict[str, str], regrouping: Regrouping, stdio: list[int]) -> None:
    """Give a standby a rank.

    Args:
        process: the standby.
        env: environment variables that make it that rank.
        regrouping: regrouping in which it joins the other ranks.
        stdio: stdout and stderr of that rank.
    """
    process.channel.send(AssignRank(regrouping.number, asdict(regrouping.fault), env), stdio)
