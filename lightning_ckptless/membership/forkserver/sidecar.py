"""Sidecars: processes of a node that its workers ask for, beside the training and no part of it.

A sidecar belongs to the agent. It is forked by the fork server like a worker, ends with it, and is asked to end
when the workers are gone. One that ends by itself is started again, later each time; training never hears of it.
"""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_ckptless.errors import LaunchError
from lightning_ckptless.membership.channel.agent_channel import FromWorker
from lightning_ckptless.membership.forkserver.client import End, ForkServer, UnsafeForkError
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.membership.worker.startup import Job
from lightning_ckptless.protocol.messages import StartSidecar

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_LOOK_EVERY_S = 0.02
_SAY_AFTER_S = 2.0
_KILL_WAIT_S = 10.0
END_GRACE_S = 600.0
"""For the last that sidecars have to do, where nobody is in a hurry."""
_STDIO = (0, 2, 2)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where the sidecars of a node run.

    Args:
        parent: forks them; another one where it could not be forked any more.
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
        """Start the process of a module with its argument; what it prints goes where the agent's own words go."""
        env = {**self.env, "OMP_NUM_THREADS": "1"}
        job = Job(Program("module", module, (argument,), self.flags), env, self.cwd, self.fresh)
        try:
            return Process.start(self.parent(), job, _STDIO)
        except UnsafeForkError:
            return Process.start(self.parent(), replace(job, fresh=True), _STDIO)


@dataclass
class _Sidecar:
    """One that was asked for.

    Args:
        module: what it runs.
        argument: of its command line.
        pause_s: how long it is not started again when it is lost next.
        process: while it runs.
        next_at: when it may be started.
        done: it has ended with what it had to do.
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
        where: they run.
        record: receives events.
        say: tells the user something.
        pause_s: how long one that was lost is not started again, the first time.
    """

    def __init__(
        self,
        where: Surroundings,
        record: Callable[..., None],
        say: Callable[[str], None],
        pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._where = where
        self._pause_s = pause_s
        self._record = record
        self._say = say
        self._asked: dict[str, _Sidecar] = {}

    def maintain(self, received: Sequence[FromWorker]) -> None:
        """Start the sidecars that are missing, and notice which have exited.

        Args:
            received: what workers have sent; a repeated request starts nothing.
        """
        for _, message, _ in received:
            if isinstance(message, StartSidecar) and message.argument not in self._asked:
                self._asked[message.argument] = _Sidecar(message.module, message.argument, self._pause_s)
        for sidecar in self._asked.values():
            self._look(sidecar)
            if sidecar.process is None and not sidecar.done and time.monotonic() >= sidecar.next_at:
                self._begin(sidecar)

    def _begin(self, sidecar: _Sidecar) -> None:
        try:
            sidecar.process = self._where.start(sidecar.module, sidecar.argument)
        except LaunchError:
            # The parent has just been lost, with all workers: what that means is not decided here.
            self._lose(sidecar, None)

    def _look(self, sidecar: _Sidecar) -> None:
        process = sidecar.process
        if process is None or (end := _end_of(process)) is None:
            return
        sidecar.process = None
        if end.exit_code == 0:
            sidecar.done = True
            return
        self._lose(sidecar, end.exit_code)

    def _lose(self, sidecar: _Sidecar, exit_code: int | None) -> None:
        sidecar.next_at = time.monotonic() + sidecar.pause_s
        self._record("companion_lost", module=sidecar.module, exit_code=exit_code, again_after_s=sidecar.pause_s)
        sidecar.pause_s = min(2 * sidecar.pause_s, _LONGEST_PAUSE_S)

    def end(self, grace_s: float) -> None:
        """Ask all to finish what they have to do, and end those that do not.

        Args:
            grace_s: how long they may take.
        """
        running = self._running()
        for process in running:
            process.signal(signal.SIGTERM)
        began, said = time.monotonic(), False
        while running and (waited_s := time.monotonic() - began) < grace_s:
            if waited_s > _SAY_AFTER_S and not said:
                said = True
                self._say(f"waiting for the last durable state, {grace_s:.0f} s at most")
            time.sleep(_LOOK_EVERY_S)
            running = self._running()
        for sidecar in self._asked.values():
            if sidecar.process is not None:
                sidecar.process.signal(signal.SIGKILL)
                sidecar.process.leave(_KILL_WAIT_S)
        self._asked.clear()

    def _running(self) -> list[Process]:
        for sidecar in self._asked.values():
            self._look(sidecar)
        return [sidecar.process for sidecar in self._asked.values() if sidecar.process is not None]


def _end_of(process: Process) -> End | None:
    """How a process has ended, after releasing what was held of it; None while it runs."""
    if not select.select([process.pidfd], [], [], 0)[0]:
        return None
    process.channel.close()
    return process.end()
