"""One process that the fork server has forked, as its agent holds it."""

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
    """A process with a line to it.

    Args:
        parent: has forked it, and reports its end.
        forked: what the parent said of it.
        line: the agent's end of the line to it.

    Attributes:
        pid: its process id.
        pidfd: becomes readable when it has ended; -1 from then on.
        line: the agent's end of the line to it.
    """

    def __init__(self, parent: ForkServer, forked: Forked, line: AgentChannel) -> None:
        self.pid = forked.pid
        self.pidfd = forked.pidfd
        self.channel = line
        self._parent = parent
        self._forked = forked
        self._memory = _open_memory(forked.pid)

    @classmethod
    def start(cls, parent: ForkServer, job: Job, stdio: Sequence[int]) -> Process:
        """Fork one.

        Args:
            parent: forks it.
            job: what it runs.
            stdio: its standard input, output and error.
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
        """Whether it has given up its memory: the first sign of an end, whatever there is to be freed."""
        if self._memory < 0:
            return False
        try:
            return os.pread(self._memory, 2, 0) == b"0 "
        except ProcessLookupError:
            return True

    def exit_code(self) -> int | None:
        """What it dies of, as in `subprocess`, told before its memory is freed.

        None where the kernel does not tell yet, or tells of success, which is what it says of those that live, too.
        """
        fields = stat_fields(self.pid)
        return None if fields is None else os.waitstatus_to_exitcode(int(fields[-1])) or None

    def signal(self, number: int, *, alone: bool = False) -> None:
        """Send it a signal; nothing where it has ended.

        Args:
            number: of the signal.
            alone: whether the processes that it has started do not get it.
        """
        if alone:
            self._parent.signal_one(self.pid, number)
        else:
            self._parent.signal([self.pid], number)

    def buried(self) -> bool:
        """Whether it has ended; releases what was held of it, once."""
        if self.pidfd >= 0 and select.select([self.pidfd], [], [], 0)[0]:
            self.end()
        return self.pidfd < 0

    def end(self) -> End:
        """How it ended, waiting until it does. Releases what was held of it; to be asked once."""
        try:
            end = self._parent.end_of(self._forked)
        except ForkServerLostError:
            end = End(-signal.SIGKILL, time.time())
        self._release()
        return end

    def leave(self, timeout_s: float) -> None:
        """Wait for the end of a process that was killed, and release what is held of it in any case.

        Args:
            timeout_s: longest wait: a process that takes longer is stuck in the kernel, at a disk that does not answer.
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
