"""The connections that process groups have made in this process, so that all of them can be cut at once.

A collective of gloo that waits for a dead peer, or for a living one that waits for the dead, ends at its time-out and
by no other call of torch: aborting the group does nothing to it. Shutting down the sockets below it ends it within
milliseconds. Duplicates of a socket in forked processes do not matter then, as they would for closing it.

A socket that listens is never touched: gloo ends the process when one fails.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

_Sockets = dict[int, str]
"""File descriptors with what they refer to: numbers are used again, the text is not."""


class Connections:
    """Connections made within `opening`, in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: _Sockets = {}
        self._before: _Sockets | None = None

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
        """Shut down what was made, and what is being made at this moment. Any thread may call it.

        Returns:
            How many connections were there to be cut.
        """
        with self._lock:
            targets = self._made | self._new()
        return sum(_shut_down(number, target) for number, target in targets.items())

    def forget(self) -> None:
        """Begin anew: what was made belongs to a generation that is over."""
        with self._lock:
            self._made.clear()

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
    return sum(_shut_down(number, target, addresses) for number, target in _sockets().items())


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


def _shut_down(number: int, target: str, only: Collection[tuple[str, int]] | None = None) -> bool:
    try:
        # The duplicate stays what it is, whatever the number is used for meanwhile.
        duplicate = os.dup(number)
    except OSError:
        return False
    facts = os.fstat(duplicate)
    if not stat.S_ISSOCK(facts.st_mode) or f"socket:[{facts.st_ino}]" != target:
        os.close(duplicate)
        return False
    with socket.socket(fileno=duplicate) as sock:
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
            return False
        try:
            host, port, *_ = sock.getpeername()
            if only is not None and (host.removeprefix("::ffff:"), port) not in only:
                return False
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # It listens, or is cut already.
            return False
    return True
