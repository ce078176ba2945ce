"""The channel between an agent and each of its workers: one local socket that carries messages both ways.

The messages, and who sends them when, are in `protocol/messages.py`.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from lightning_ckptless import environment
from lightning_ckptless.errors import ProtocolError
from lightning_ckptless.membership.channel import socket_messages
from lightning_ckptless.protocol.messages import Message, decode, encode


class Received(NamedTuple):
    """A received message.

    Args:
        message: what was sent.
        files: file descriptors that came with it, owned by the receiver.
    """

    message: Message
    files: list[int]


class FromWorker(NamedTuple):
    """A message from one of an agent's workers.

    Args:
        rank: local rank of the worker.
        message: what it sent.
        files: file descriptors that came with it, owned by the receiver.
    """

    rank: int
    message: Message
    files: Sequence[int] = ()


class AgentChannel:
    """One end of the channel.

    Args:
        sock: its socket, blocking; owned by this object.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        self._ended = False

    @classmethod
    def pair(cls) -> tuple[AgentChannel, AgentChannel]:
        """Both ends of a new channel."""
        ours, theirs = socket.socketpair()
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        """File descriptor to wait on."""
        return self._socket.fileno()

    @property
    def ended(self) -> bool:
        """Whether either end has closed."""
        return self._ended

    def send(self, message: Message, files: Sequence[int] = ()) -> None:
        """Send a message. Callable from any thread.

        A message to an end that has closed is silently dropped: the death of the other process is detected elsewhere.

        Args:
            message: what to send.
            files: file descriptors that go with it.
        """
        encoded = encode(message)
        with self._sending, suppress(OSError):
            socket_messages.send(self._socket, encoded, files)

    def receive(self) -> Received | None:
        """Wait for the next message; None when the other end has closed.

        Raises:
            ProtocolError: it is none of `protocol/messages.py`.
        """
        try:
            received = socket_messages.receive(self._socket)
        except OSError:
            received = None
        self._ended = received is None
        if received is None:
            return None
        encoded, files = received
        try:
            return Received(decode(encoded), files)
        except ProtocolError:
            socket_messages.close_all(files)
            raise

    def poll(self) -> list[Received]:
        """Return the messages that have arrived, without waiting for more."""
        found: list[Received] = []
        while not self._ended and select.select([self._socket], [], [], 0)[0]:
            received = self.receive()
            if received is not None:
                found.append(received)
        return found

    def close(self) -> None:
        """Close the channel; the other end notices at once, even if other processes hold duplicates of this one."""
        self._ended = True
        socket_messages.hang_up(self._socket)

    def hand_over(self) -> None:
        """Close this process's descriptor of an end that another process has received."""
        self._ended = True
        self._socket.close()


_opened: dict[int, AgentChannel] = {}
"""The channel of this process, by process id: a forked child has none."""


def open_channel(env: MutableMapping[str, str] = os.environ) -> AgentChannel | None:
    """Return the worker's end of the channel to its agent; None if none of our agents started this process itself.

    There is one per process, shared by all of its trainers. The variable is removed from the environment: the channel
    belongs to this process and to none of its children.
    """
    number = env.pop(environment.CHANNEL, "")
    if number.isdigit() and _is_socket(int(number)):
        sock = socket.socket(fileno=int(number))
        sock.set_inheritable(False)
        _opened[os.getpid()] = AgentChannel(sock)
    return _opened.get(os.getpid())


def is_standby(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process has no rank yet."""
    return environment.STANDBY in env


def _is_socket(number: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError:
        return False
