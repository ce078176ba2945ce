"""Sidecars: processes that a node's workers request and that run during training.

A sidecar belongs to the agent. It is forked by the fork server like a worker, exits with it, and is asked to end with
the run: it continues while all workers are relaunched, which therefore do not wait for its work. One that fails is
restarted, after a growing pause; training is not affected. One that has completed its work is restarted if a worker
requests it again.
"""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_ckptless.errors import LaunchError
from lightning_ckptless.membership.channel.agent_channel import FromWorker
from lightning_ckptless.membership.events import Report, SidecarLost, WaitingForSidecars
from lightning_ckptless.membership.forkserver.client import End, ForkServer, UnsafeForkError
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.membership.worker.startup import Job
from lightning_ckptless.protocol.messages import Message, StartSidecar

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_POLL_EVERY_S = 0.02
_REPORT_AFTER_S = 2.0
_KILL_WAIT_S = 10.0
END_GRACE_S = 600.0
"""Time for the last work of sidecars if the end of the run is not urgent."""
_STDIO = (0, 2, 2)


@dataclass(frozen=True, slots=True)
class SidecarLauncher:
    """Starts the sidecars of a node.

    Args:
        parent: returns the fork server that forks them; it may be another one later.
        env: their environment.
        cwd: their working directory.
        flags: options of the interpreter.
        fresh: start new interpreters instead of forking the fork server.
    """

    parent: Callable[[], ForkServer]
    env: Mapping[str, str]
    cwd: str
    flags: tuple[str, ...]
    fresh: bool

    def start(self, module: str, argument: str) -> Process:
        """Start the process of a module with its argument; its output goes where the agent's does."""
        env = {**self.env, "OMP_NUM_THREADS": "1"}
        job = Job(Program("module", module, (argument,), self.flags), env, self.cwd, self.fresh)
        try:
            return Process.start(self.parent(), job, _STDIO)
        except UnsafeForkError:
            return Process.start(self.parent(), replace(job, fresh=True), _STDIO)


@dataclass
class _Sidecar:
    """A requested sidecar.

    Args:
        module: what it runs.
        argument: argument of its command line.
        pause_s: pause in seconds before the next restart.
        process: while it runs.
        next_at: earliest time of the next start.
        done: whether it has completed its work.
    """

    module: str
    argument: str
    pause_s: float
    process: Process | None = None
    next_at: float = 0.0
    done: bool = False


class Sidecars:
    """The sidecars of one node.

    Args:
        where: starts them.
        report: receives events.
        pause_s: pause in seconds before the first restart of a sidecar.
    """

    def __init__(self, where: SidecarLauncher, report: Report, pause_s: float = _FIRST_PAUSE_S) -> None:
        self._where = where
        self._pause_s = pause_s
        self._report = report
        self._asked: dict[str, _Sidecar] = {}
        self._received: list[Message] = []

    def receive(self) -> list[Message]:
        """Return the messages that sidecars have sent since the last call."""
        received, self._received = self._received, []
        return received

    def maintain(self, received: Sequence[FromWorker]) -> None:
        """Start the sidecars that are missing, and notice which have exited.

        Args:
            received: what workers have sent; a request for one that runs starts nothing.
        """
        for sidecar in self._asked.values():
            self._poll(sidecar)
        for _, message, _ in received:
            if isinstance(message, StartSidecar) and self._is_needed(message.argument):
                self._asked[message.argument] = _Sidecar(message.module, message.argument, self._pause_s)
        for sidecar in self._asked.values():
            if sidecar.process is None and not sidecar.done and time.monotonic() >= sidecar.next_at:
                self._begin(sidecar)

    def _is_needed(self, argument: str) -> bool:
        asked = self._asked.get(argument)
        return asked is None or asked.done

    def _begin(self, sidecar: _Sidecar) -> None:
        try:
            sidecar.process = self._where.start(sidecar.module, sidecar.argument)
        except LaunchError:
            # The fork server was just lost with all workers, which the agent handles elsewhere.
            self._lose(sidecar, None)

    def _poll(self, sidecar: _Sidecar) -> None:
        process = sidecar.process
        if process is not None:
            self._received += [received.message for received in process.channel.poll()]
        if process is None or (end := _end_of(process)) is None:
            return
        sidecar.process = None
        if end.exit_code == 0:
            sidecar.done = True
            return
        self._lose(sidecar, end.exit_code)

    def _lose(self, sidecar: _Sidecar, exit_code: int | None) -> None:
        sidecar.next_at = time.monotonic() + sidecar.pause_s
        self._report(SidecarLost(sidecar.module, exit_code, sidecar.pause_s))
        sidecar.pause_s = min(2 * sidecar.pause_s, _LONGEST_PAUSE_S)

    def end(self, grace_s: float) -> None:
        """Ask all sidecars to finish their work, and kill those that do not.

        Args:
            grace_s: time for that, in seconds.
        """
        running = self._running()
        for process in running:
            process.signal(signal.SIGTERM)
        began, has_reported = time.monotonic(), False
        while running and (waited_s := time.monotonic() - began) < grace_s:
            if waited_s > _REPORT_AFTER_S and not has_reported:
                has_reported = True
                self._report(WaitingForSidecars(grace_s))
            time.sleep(_POLL_EVERY_S)
            running = self._running()
        for sidecar in self._asked.values():
            if sidecar.process is not None:
                sidecar.process.signal(signal.SIGKILL)
                sidecar.process.leave(_KILL_WAIT_S)
        self._asked.clear()

    def _running(self) -> list[Process]:
        for sidecar in self._asked.values():
            self._poll(sidecar)
        return [sidecar.process for sidecar in self._asked.values() if sidecar.process is not None]


def _end_of(process: Process) -> End | None:
    """Return how a process has exited, after releasing its resources; None while it runs."""
    if not select.select([process.pidfd], [], [], 0)[0]:
        return None
    process.channel.close()
    return process.end()
