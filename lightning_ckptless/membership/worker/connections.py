"""The connections opened by process groups in this process, so that all of them can be aborted at once.

A gloo collective that waits for a dead peer, or for a live one that waits for the dead, ends only at its timeout:
aborting the group has no effect on it. Shutting down its sockets ends it within milliseconds. Unlike closing, this also
works while forked processes hold duplicates of a socket.

Only the receiving side is shut down, and a duplicate keeps the connection open when gloo closes it in response. Peers
must not notice, because gloo would leave a peer that is sending at this moment stuck (`stuck_collectives.py`). Each
rank aborts its own waits, and closes the duplicates once all ranks have continued.

While a group is being created, its thread may wait for more than an established connection:

| The thread waits for | It is aborted by |
|---|---|
| an answer of the store | shutting down the connection to the store |
| a peer that is to connect to this process | connecting in the place of each peer, and closing that connection |
| a peer that does not accept this process's connection | shutting down the attempt; gloo repeats it three times |

A listening socket is never shut down: gloo ends the process when one fails.
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
"""First message of a peer on a new connection to gloo: a number that identifies the connection to the listener."""
_GREET_TIMEOUT_S = 0.1

_Sockets = dict[int, str]
"""File descriptors with their link targets: descriptors are reused, targets are not."""


class Connections:
    """Connections opened within `opening`, in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: _Sockets = {}
        self._before: _Sockets | None = None
        self._peers = 0
        self._waited_on: _Sockets = {}
        self._greeted: set[str] = set()
        self._aborted: dict[str, socket.socket] = {}
        self._retired: list[socket.socket] = []

    @contextmanager
    def opening(self, peers: int, waits_on: Mapping[int, str] = MappingProxyType({})) -> Iterator[None]:
        """Track every socket that is new within this block; `abort` ends what waits within it.

        Args:
            peers: number of ranks in the largest group that is created within it.
            waits_on: connections that existed before, as returned by `new_sockets`, and are tracked within the block
                only.
        """
        with self._lock:
            self._before, self._peers, self._waited_on = _sockets(), peers, dict(waits_on)
        try:
            yield
        finally:
            with self._lock:
                self._made |= _beyond(self._before)
                self._before, self._waited_on = None, {}

    def abort(self) -> int:
        """Stop reading from tracked connections, and abort those being established. Callable from any thread.

        Returns:
            Number of newly aborted connections, including connection attempts.
        """
        with self._lock:
            new = self._new()
            targets = {number: target for number, target in (self._made | new).items() if target not in self._aborted}
            found = {
                target: sock for number, target in targets.items() if (sock := _shut_down(number, target)) is not None
            }
            self._aborted |= found
            return len(found) + sum(self._end_wait(number, target) for number, target in new.items())

    def _end_wait(self, number: int, target: str) -> bool:
        """Abort a wait for a connection that does not exist yet; returns whether a connection attempt was in flight."""
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

    def has_aborted(self, sockets: Mapping[int, str]) -> bool:
        """Whether any of these sockets has been aborted since `forget`; data that had arrived can still be read."""
        with self._lock:
            return any(target in self._aborted for target in sockets.values())

    def forget(self) -> None:
        """Forget the tracked connections: they belong to a generation that has ended."""
        with self._lock:
            self._made.clear()
            self._greeted.clear()
            self._retired += self._aborted.values()
            self._aborted.clear()

    def release(self) -> None:
        """Close what was aborted before `forget`: no peer uses it any more."""
        with self._lock:
            retired, self._retired = self._retired, []
        for sock in retired:
            sock.close()

    def _new(self) -> _Sockets:
        return {} if self._before is None else _beyond(self._before) | self._waited_on


@contextmanager
def new_sockets() -> Iterator[dict[int, str]]:
    """Collect the sockets that are created within this block: the dictionary is filled when it ends."""
    before, found = _sockets(), dict[int, str]()
    yield found
    found.update(_beyond(before))


def abort_connections_to(addresses: Collection[tuple[str, int]]) -> int:
    """Shut down this process's connections to certain ports, whatever code opened them. Callable from any thread.

    Args:
        addresses: numeric address and port of each.

    Returns:
        Number of connections that were shut down.
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
    """Return the sockets that exist now and did not before."""
    return {number: target for number, target in _sockets().items() if before.get(number) != target}


def _greet(listener: socket.socket, peers: int) -> None:
    """Connect to a listener as each of its peers would, and close the connection: gloo sees each peer leave.

    The kernel accepts the connections. A listener that is not gloo's reads eight bytes and an end of file.
    """
    for number in range(peers):
        with suppress(OSError), socket.socket(listener.family) as peer:
            peer.settimeout(_GREET_TIMEOUT_S)
            peer.connect(listener.getsockname())
            peer.sendall(_GREETING.pack(number))


def _shut_down(number: int, target: str) -> socket.socket | None:
    """Shut down reading from a connection; returns a duplicate, or None if it is no connection."""
    sock = _connection(number, target)
    if sock is not None:
        with suppress(OSError):
            # If the peer has already closed, there is nothing to read.
            sock.shutdown(socket.SHUT_RD)
    return sock


def _connection(number: int, target: str) -> socket.socket | None:
    """Return a duplicate of a connection; None if it is none, listens, or is still being established."""
    sock = _tcp_socket(number, target)
    if sock is not None and _peer(sock) is None:
        sock.close()
        return None
    return sock


def _tcp_socket(number: int, target: str) -> socket.socket | None:
    """Return a duplicate of a TCP socket; None if it is none."""
    try:
        # The duplicate stays valid, even if the number is reused meanwhile.
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
    """Return numeric address and port of the other end; None if there is none."""
    try:
        host, port, *_ = sock.getpeername()
    except OSError:
        return None
    return host.removeprefix("::ffff:"), port
