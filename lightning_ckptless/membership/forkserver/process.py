"""A process forked by the fork server, as its agent sees it."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Sequence

from lightning_ckptless.membership.channel.agent_channel import AgentChannel
from lightning_ckptless.membership.forkserver.client import End, Forked, ForkServer, ForkServerLostError
from lightning_ckptless.membership.worker.startup import Job
from lightning_ckptless.system.procfs import stat_fields


class Process:
    """A process with a channel to it.

    Args:
        parent: fork server that has forked it, and reports its exit.
        forked: as returned by the fork server.
        channel: the agent's end.

    Attributes:
        pid: its process id.
        pidfd: becomes readable when it has exited; -1 from then on.
        channel: the agent's end.
    """

    def __init__(self, parent: ForkServer, forked: Forked, channel: AgentChannel) -> None:
        self.pid = forked.pid
        self.pidfd = forked.pidfd
        self.channel = channel
        self._parent = parent
        self._forked = forked
        self._memory = _open_memory(forked.pid)

    @classmethod
    def start(cls, parent: ForkServer, job: Job, stdio: Sequence[int]) -> Process:
        """Fork a process.

        Args:
            parent: fork server.
            job: what it runs.
            stdio: its stdin, stdout and stderr.
        """
        ours, theirs = AgentChannel.pair()
        try:
            return cls(parent, parent.fork(job, [*stdio, theirs.fileno()]), ours)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.hand_over()

    def is_dying(self) -> bool:
        """Whether it has released its address space, which is the first sign of an exit, before its memory is freed."""
        if self._memory < 0:
            return False
        try:
            return os.pread(self._memory, 2, 0) == b"0 "
        except ProcessLookupError:
            return True

    def exit_code(self) -> int | None:
        """Return its exit code as in `subprocess`, which the kernel reveals before the memory is freed.

        None if the kernel does not reveal it yet. Zero counts as not revealed: it is also the value of a living
        process.
        """
        fields = stat_fields(self.pid)
        return None if fields is None else os.waitstatus_to_exitcode(int(fields[-1])) or None

    def signal(self, number: int, *, alone: bool = False) -> None:
        """Send it a signal; does nothing if it has exited.

        Args:
            number: number of the signal.
            alone: whether to exclude the processes that it has started.
        """
        if alone:
            self._parent.signal_one(self.pid, number)
        else:
            self._parent.signal([self.pid], number)

    def has_ended(self) -> bool:
        """Whether it has exited; releases its resources the first time."""
        if self.pidfd >= 0 and select.select([self.pidfd], [], [], 0)[0]:
            self.end()
        return self.pidfd < 0

    def end(self) -> End:
        """Wait until it exits, and return how it did. Releases its resources; may be called once."""
        try:
            end = self._parent.end_of(self._forked)
        except ForkServerLostError:
            end = End(-signal.SIGKILL, time.time())
        self._release()
        return end

    def leave(self, timeout_s: float) -> None:
        """Wait for the exit of a killed process, and release its resources in any case.

        Args:
            timeout_s: longest wait in seconds: a process that takes longer is stuck in the kernel, e.g. on an
                unresponsive disk.
        """
        self.channel.close()
        if self.pidfd < 0:
            return
        if select.select([self.pidfd], [], [], timeout_s)[0]:
            self.end()
        else:
            self._release()

    def _release(self) -> None:
        os.close(self.pidfd)
        self.pidfd = -1
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1


def _open_memory(pid: int) -> int:
    try:
        return os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
