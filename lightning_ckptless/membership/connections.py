"""The connections that process groups have made in this process, so that all of them can be cut at once.

A collective of gloo that waits for a dead peer, or for a living one that waits for the dead, ends at its time-out and
by no other call of torch: aborting the group does nothing to it. Shutting down the sockets below it ends it within
milliseconds. Duplicates of a socket in forked processes do not matter then, as they would for closing it.

Only our side of reading is shut down, and a duplicate keeps the connection when gloo closes it upon that: no peer may
notice, for a peer that sends at this moment would be lost in gloo (`lost_waits.py`). Each rank ends what it does itself
waits for, and lets go of the duplicates when all have gone on.

A socket that listens is never touched: gloo ends the process when one fails.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

_Sockets = dict[int, str]
"""File descriptors with what they refer to: numbers are used again, the text is not."""


class Connections:
    """Connections made within `opening`, in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: _Sockets = {}
        self._before: _Sockets | None = None
        self._cut: dict[str, socket.socket] = {}
        self._retired: list[socket.socket] = []

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Count every socket that is new within this block as one of ours."""
        with self._lock:
            self._before = _sockets()
        try:
            yield
        finally:
            with self._lock:
                self._made |= self._new()
                self._before = None

    def cut(self) -> int:
        """Let nothing be read from what was made, and what is being made at this moment. Any thread may call it.

        Returns:
            How many connections were there that had not been cut before.
        """
        with self._lock:
            targets = self._made | self._new()
            found = {
                target: sock
                for number, target in targets.items()
                if target not in self._cut and (sock := _shut_down(number, target)) is not None
            }
            self._cut |= found
            return len(found)

    def forget(self) -> None:
        """Begin anew: what was made belongs to a generation that is over."""
        with self._lock:
            self._made.clear()
            self._retired += self._cut.values()
            self._cut.clear()

    def bury(self) -> None:
        """Close what was cut before `forget`: no peer uses it any more."""
        with self._lock:
            retired, self._retired = self._retired, []
        for sock in retired:
            sock.close()

    def _new(self) -> _Sockets:
        before = self._before
        if before is None:
            return {}
        return {number: target for number, target in _sockets().items() if before.get(number) != target}


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
    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM and _peer(sock) is not None:
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
