"""Notes from workers to the benchmark over a Unix socket.

A worker sends one line of JSON per moment, and the kernel reports when it has exited. So the benchmark waits for
events and needs no assumptions about durations. The benchmark may reply to a worker that waits for a line.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

STANDBY = "CKPTLESS_STANDBY"
"""Not imported from the package, because the time at which imports begin is measured."""
SOCKET = "CKPTLESS_BENCH_SOCKET"
"""Environment variable with the path of the benchmark's socket."""


@dataclass(frozen=True, eq=False)
class Note:
    """A message from a worker.

    Args:
        moment: name of the event; `disconnected` if the worker's end was closed.
        at: wall clock, seconds since the epoch.
        pid: process id of the worker; 0 if it never sent a line.
        rank: rank of the worker; -1 while it has none.
        fields: other values.
        wire: connection to the worker.
    """

    moment: str
    at: float
    pid: int
    rank: int
    fields: dict[str, Any]
    wire: socket.socket

    def reply(self, **fields: Any) -> None:
        """Send a line to the worker."""
        self.wire.sendall(json.dumps(fields).encode() + b"\n")


@dataclass
class _Connection:
    """State of a connection: bytes after the last complete line, and the worker at the other end."""

    rest: bytes = b""
    pid: int = 0
    rank: int = -1


@dataclass
class Inbox:
    """The benchmark's end of all connections.

    Args:
        path: path of the socket, at most 100 characters.
    """

    path: Path
    _notes: deque[Note] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(128)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def next(self, timeout_s: float) -> Note | None:
        """Return the next note; None if there is none within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self._notes:
            remaining_s = deadline - time.monotonic()
            ready = self._selector.select(max(0.0, remaining_s))
            if not ready:
                if remaining_s <= 0:
                    return None
                continue
            for key, _ in ready:
                self._receive(key)
        return self._notes.popleft()

    def _receive(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._listener:
            wire, _ = self._listener.accept()
            self._selector.register(wire, selectors.EVENT_READ, _Connection())
            return
        assert isinstance(key.fileobj, socket.socket)
        wire, connection = key.fileobj, key.data
        try:
            data = wire.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(wire)
            self._notes.append(Note("disconnected", time.time(), connection.pid, connection.rank, {}, wire))
            wire.close()
            return
        *lines, connection.rest = (connection.rest + data).split(b"\n")
        for line in lines:
            values = json.loads(line)
            connection.pid, connection.rank = values.pop("pid"), values.pop("rank")
            self._notes.append(
                Note(values.pop("moment"), values.pop("at"), connection.pid, connection.rank, values, wire)
            )

    def close(self) -> None:
        """Close all connections."""
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Wire:
    """A worker's end of a connection.

    Args:
        path: path of the benchmark's socket.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._lock = threading.Lock()

    def send(self, moment: str, *, at: float | None = None, **fields: Any) -> None:
        """Report an event. May be called in any thread."""
        # A standby has the variables of a rank, but no rank yet.
        named = "-1" if STANDBY in os.environ else os.environ.get("RANK", os.environ.get("LOCAL_RANK", "-1"))
        rank = int(named)
        note = {"moment": moment, "at": time.time() if at is None else at, "pid": os.getpid(), "rank": rank, **fields}
        with self._lock:
            self._socket.sendall(json.dumps(note).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """Wait for a line from the benchmark; exit if the benchmark has ended."""
        line = self._lines.readline()
        if not line:
            raise SystemExit("the benchmark has ended")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()
        self._socket.close()
