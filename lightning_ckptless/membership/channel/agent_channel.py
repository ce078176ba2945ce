"""The line between an agent and each of its workers: one local socket, messages both ways.

| From | Message | Says |
|---|---|---|
| worker | `arrived` | the program has come to its trainer; with the folder that Hydra has made for it, if any |
| worker | `came_to_fit` | its program has called `fit` |
| worker | `past_fit` | that call has returned, or raised: what follows is the program's own |
| worker | `entered` | it is about to train; with what its strategy asks of the agent |
| worker | `stepped` | its generation has committed a step |
| worker | `imported` | what its program has imported until then; once |
| worker | `left` | it has left the training loop: its end is no fault from here on, and no peer can wait for it |
| worker | `waiting` | it has come to the loop alone, and waits there for the others |
| worker | `released` | it has left the process groups that it shared with the lost |
| worker | `met` | it has met the others under this number |
| worker | `held` | it cannot get free of them, with the reason, its threads and its sockets |
| worker | `stands` | whether it waits for others, when it was asked `where` it is |
| worker | `unable` | it cannot go on in place, with the reason |
| worker | `sidecar` | it asks for a process beside the workers, of this module with this argument |
| worker | `memory` | it asks for files of anonymous memory at these paths; with a socket for the answer |
| worker | `ready` | a standby has come to `fit` and waits for a rank |
| agent | `regroup` | a fault: meet under this number, with this report |
| agent | `hold` | the nodes meet anew: wait for the next `regroup`, however long it takes |
| agent | `assign` | to a standby: variables that make it a rank, then as `regroup`; with its output |
| agent | `where` | all are silent: does it wait for others? |
| agent | `over` | the run has ended with a fault: nobody goes on |
| agent | `finish` | the run is to end: commit the step, save and leave |

What counts is the last `regroup` that was sent, so a worker that was busy through several needs to read but one.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from lightning_ckptless import environment
from lightning_ckptless.membership.channel import socket_messages
from lightning_ckptless.membership.channel.socket_messages import Message


class Line:
    """One end of the line.

    Args:
        sock: its socket, blocking; owned by this object.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._telling = threading.Lock()
        self._ended = False

    @classmethod
    def pair(cls) -> tuple[Line, Line]:
        """Both ends of a new line."""
        ours, theirs = socket.socketpair()
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        """File descriptor, to wait for."""
        return self._socket.fileno()

    @property
    def ended(self) -> bool:
        """Whether the other end is gone, or this one closed."""
        return self._ended

    def tell(self, kind: str, files: Sequence[int] = (), **fields: Any) -> None:
        """Send a message; lost without a word where the other end is gone, which shows elsewhere. Any thread.

        Args:
            kind: what it is.
            files: file descriptors that go with it.
            fields: what it says, as JSON has it.
        """
        with self._telling, suppress(OSError):
            socket_messages.send(self._socket, {"kind": kind, **fields}, files)

    def receive(self) -> tuple[Message, list[int]] | None:
        """Wait for the next message, with its files; None when the other end is gone."""
        try:
            received = socket_messages.receive(self._socket)
        except OSError:
            received = None
        self._ended = received is None
        return received

    def waiting(self) -> list[Message]:
        """The messages that have come, without waiting for more; files that came with one are its `files`."""
        found: list[Message] = []
        while not self._ended and select.select([self._socket], [], [], 0)[0]:
            received = self.receive()
            if received is not None:
                message, files = received
                found.append({**message, "files": files} if files else message)
        return found

    def close(self) -> None:
        """End the line: the other end sees it at once, whichever processes hold duplicates of this one."""
        self._ended = True
        socket_messages.hang_up(self._socket)

    def hand_over(self) -> None:
        """Close this process's descriptor of an end that another process has received."""
        self._ended = True
        self._socket.close()


_opened: dict[int, Line] = {}
"""The line of this process, by process id: a process that it forks has none."""


def open_line(env: MutableMapping[str, str] = os.environ) -> Line | None:
    """The worker's end of the line to its agent; None where no agent of ours has started this very process.

    There is one per process, whichever of its trainers asks for it. The variable is taken out of the environment: the
    line belongs to one process, and to none that it starts.
    """
    number = env.pop(environment.LINE, "")
    if number.isdigit() and _is_socket(int(number)):
        sock = socket.socket(fileno=int(number))
        sock.set_inheritable(False)
        _opened[os.getpid()] = Line(sock)
    return _opened.get(os.getpid())


def is_standby(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process has no rank yet."""
    return environment.STANDBY in env


def _is_socket(number: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError:
        return False
