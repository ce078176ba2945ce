"""The connections that process groups have made in this process, so that all of them can be cut at once.

A collective of gloo that waits for a dead peer, or for a living one that waits for the dead, ends at its time-out and
by no other call of torch: aborting the group does nothing to it. Shutting down the sockets below it ends it within
milliseconds. Duplicates of a socket in forked processes do not matter then, as they would for closing it.

Only our side of reading is shut down, and a duplicate keeps the connection when gloo closes it upon that: no peer may
notice, for a peer that sends at this moment would be lost in gloo (`lost_waits.py`). Each rank ends what it does itself
waits for, and lets go of the duplicates when all have gone on.

While a group is being made, its thread may wait for more than an established connection:

| The thread waits for | It is ended by |
|---|---|
| an answer of the store | shutting down the connection to the store |
| a peer that is to connect to this process | connecting in the place of each peer, and closing that connection |
| a peer that does not accept this process's connection | shutting down the attempt; gloo repeats it three times |

A socket that listens is never shut down: gloo ends the process when one fails.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType

_SYN_SENT = 2
_GREETING = struct.Struct("=q")
"""What a peer sends first on a new connection to gloo: the number that tells the connections of a listener apart."""
_GREET_TIMEOUT_S = 0.1

_Sockets = dict[int, str]
"""File descriptors with what they refer to: numbers are used again, the text is not."""


class Connections:
    """Connections made within `opening`, in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: _Sockets = {}
        self._before: _Sockets | None = None
        self._peers = 0
        self._waited_on: _Sockets = {}
        self._greeted: set[str] = set()
        self._cut: dict[str, socket.socket] = {}
        self._retired: list[socket.socket] = []

    @contextmanager
    def opening(self, peers: int, waits_on: Mapping[int, str] = MappingProxyType({})) -> Iterator[None]:
        """Count every socket that is new within this block as one of ours; `cut` ends what waits within it.

        Args:
            peers: most ranks of a group that is made within it.
            waits_on: connections that were there before, as `new_sockets` has told, and are ours within it only.
        """
        with self._lock:
            self._before, self._peers, self._waited_on = _sockets(), peers, dict(waits_on)
        try:
            yield
        finally:
            with self._lock:
                self._made |= _beyond(self._before)
                self._before, self._waited_on = None, {}

    def cut(self) -> int:
        """Let nothing be read from what was made, and end what is being made at this moment. Any thread may call it.

        Returns:
            How many connections were there that had not been cut before, attempts to connect included.
        """
        with self._lock:
            new = self._new()
            targets = {number: target for number, target in (self._made | new).items() if target not in self._cut}
            found = {
                target: sock for number, target in targets.items() if (sock := _shut_down(number, target)) is not None
            }
            self._cut |= found
            return len(found) + sum(self._end_wait(number, target) for number, target in new.items())

    def _end_wait(self, number: int, target: str) -> bool:
        """End a wait for a connection that is not there yet; returns whether an attempt to connect was under way."""
        sock = None if target in self._greeted else _tcp_socket(number, target)
        if sock is None:
            return False
        with sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                self._greeted.add(target)
                _greet(sock, self._peers)
            elif sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _SYN_SENT:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                return True
        return False

    def has_cut(self, sockets: Mapping[int, str]) -> bool:
        """Whether any of some sockets has been cut since `forget`: answers that come in time are still read from it."""
        with self._lock:
            return any(target in self._cut for target in sockets.values())

    def forget(self) -> None:
        """Begin anew: what was made belongs to a generation that is over."""
        with self._lock:
            self._made.clear()
            self._greeted.clear()
            self._retired += self._cut.values()
            self._cut.clear()

    def bury(self) -> None:
        """Close what was cut before `forget`: no peer uses it any more."""
        with self._lock:
            retired, self._retired = self._retired, []
        for sock in retired:
            sock.close()

    def _new(self) -> _Sockets:
        return {} if self._before is None else _beyond(self._before) | self._waited_on


@contextmanager
def new_sockets() -> Iterator[dict[int, str]]:
    """Note the sockets that are made within this block: the dictionary is filled when it ends."""
    before, found = _sockets(), dict[int, str]()
    yield found
    found.update(_beyond(before))


def cut_connections_to(addresses: Collection[tuple[str, int]]) -> int:
    """Shut down this process's connections to certain ports, whoever has made them. Any thread may call it.

    Args:
        addresses: numeric address and port of each.

    Returns:
        How many there were.
    """
    found = [_connection(number, target) for number, target in _sockets().items()]
    count = 0
    for sock in found:
        if sock is None:
            continue
        with sock, suppress(OSError):
            if _peer(sock) in addresses:
                sock.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def _sockets() -> _Sockets:
    found: _Sockets = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found[int(name)] = target
    return found


def _beyond(before: _Sockets) -> _Sockets:
    """The sockets that are there now and were not before."""
    return {number: target for number, target in _sockets().items() if before.get(number) != target}


def _greet(listener: socket.socket, peers: int) -> None:
    """Connect to a listener as each of its peers would, and close the connection: gloo sees each peer leave.

    The kernel accepts the connections. A listener that is not gloo's reads eight bytes and an end.
    """
    for number in range(peers):
        with suppress(OSError), socket.socket(listener.family) as peer:
            peer.settimeout(_GREET_TIMEOUT_S)
            peer.connect(listener.getsockname())
            peer.sendall(_GREETING.pack(number))


def _shut_down(number: int, target: str) -> socket.socket | None:
    """Let nothing be read from a connection any more; returns a duplicate, or None where it is none."""
    sock = _connection(number, target)
    if sock is not None:
        with suppress(OSError):
            # Where the peer is gone already there is nothing to read.
            sock.shutdown(socket.SHUT_RD)
    return sock


def _connection(number: int, target: str) -> socket.socket | None:
    """A duplicate of a connection; None where it is none, or listens, or is still being made."""
    sock = _tcp_socket(number, target)
    if sock is not None and _peer(sock) is None:
        sock.close()
        return None
    return sock


def _tcp_socket(number: int, target: str) -> socket.socket | None:
    """A duplicate of a TCP socket; None where it is none."""
    try:
        # The duplicate stays what it is, whatever the number is used for meanwhile.
        duplicate = os.dup(number)
    except OSError:
        return None
    facts = os.fstat(duplicate)
    if not stat.S_ISSOCK(facts.st_mode) or f"socket:[{facts.st_ino}]" != target:
        os.close(duplicate)
        return None
    sock = socket.socket(fileno=duplicate)
    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
        return sock
    sock.close()
    return None


def _peer(sock: socket.socket) -> tuple[str, int] | None:
    """Numeric address and port at the other end; None where there is none."""
    try:
        host, port, *_ = sock.getpeername()
    except OSError:
        return None
    return host.removeprefix("::ffff:"), port
