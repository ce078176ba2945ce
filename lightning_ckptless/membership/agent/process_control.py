"""Starting processes and waiting for them, for the workers of one agent.

Apart from the workers, because the recovery simulation has its own processes.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.worker.startup import Job


class Waited(NamedTuple):
    """The result of waiting for processes.

    Args:
        ended: keys of those that have exited.
        has_news: whether one has exited, or a message may have arrived.
    """

    ended: Sequence[int]
    has_news: bool


class ProcessControl(Protocol):
    """Starts processes, and waits for them."""

    def start(self, job: Job, stdio: Sequence[int]) -> Process:
        """Start a process.

        Args:
            job: what it runs.
            stdio: its stdin, stdout and stderr.
        """

    def wait(self, processes: Mapping[int, Process], timeout_s: float, *, for_messages: bool) -> Waited:
        """Wait until a process exits.

        Args:
            processes: those that have not been seen to exit, by any key.
            timeout_s: longest wait, in seconds.
            for_messages: whether to stop waiting when a process sends a message.
        """


class ForkedProcesses(ProcessControl):
    """Processes forked from a fork server.

    Args:
        parent: returns the fork server that forks now; it may be another one later.
    """

    def __init__(self, parent: Callable[[], ForkServer]) -> None:
        self._parent = parent

    def start(self, job: Job, stdio: Sequence[int]) -> Process:
        """Fork a process."""
        return Process.start(self._parent(), job, stdio)

    def wait(self, processes: Mapping[int, Process], timeout_s: float, *, for_messages: bool) -> Waited:
        """Wait until a process exits."""
        poll, of_file = select.poll(), dict[int, int]()
        for key, process in processes.items():
            of_file[process.pidfd] = key
            poll.register(process.pidfd, select.POLLIN)
            if for_messages and not process.channel.ended:
                poll.register(process.channel.fileno(), select.POLLIN)
        ready = [number for number, _ in poll.poll(timeout_s * 1000)]
        return Waited([of_file[number] for number in ready if number in of_file], bool(ready))
