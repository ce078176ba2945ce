"""Notes from workers to the benchmark over a Unix socket.

A worker sends a note at each moment, and the kernel reports when it has exited. So the benchmark waits for events and
needs no assumptions about durations. The benchmark may reply to a worker that waits for its turn.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
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
        pid: process id of the worker; 0 if it never sent a note.
        rank: rank of the worker; -1 while it has none.
        fields: other values.
        wire: connection to the worker, for a reply.
    """

    moment: str
    at: float
    pid: int
    rank: int
    fields: dict[str, Any]
    wire: Connection


class Inbox:
    """The benchmark's end of all connections, on a socket whose path has at most 100 characters."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._notes = deque[Note]()
        self._workers: dict[Connection, tuple[int, int]] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(128)

    def next(self, timeout_s: float) -> Note | None:
        """Return the next note; None if there is none within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self._notes:
            ready = wait([self._listener, *self._workers], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            for end in ready:
                if isinstance(end, Connection):
                    self._receive(end)
                else:
                    self._workers[Connection(self._listener.accept()[0].detach())] = 0, -1
        return self._notes.popleft()

    def _receive(self, wire: Connection) -> None:
        try:
            moment, at, pid, rank, fields = wire.recv()
        except (EOFError, OSError):
            self._notes.append(Note("disconnected", time.time(), *self._workers.pop(wire), {}, wire))
            wire.close()
        else:
            self._workers[wire] = pid, rank
            self._notes.append(Note(moment, at, pid, rank, fields, wire))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for wire in self._workers:
            wire.close()
        self.path.unlink(missing_ok=True)


class Wire:
    """A worker's end of a connection."""

    def __init__(self, path: str) -> None:
        self._connection = Client(path)
        self._lock = threading.Lock()

    def send(self, moment: str, *, at: float | None = None, **fields: Any) -> None:
        """Report an event. May be called in any thread."""
        # A standby has the variables of a rank, but no rank yet.
        rank = -1 if STANDBY in os.environ else int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "-1")))
        with self._lock:
            self._connection.send((moment, time.time() if at is None else at, os.getpid(), rank, fields))

    def receive(self) -> dict[str, Any]:
        """Wait for a reply; exit if the benchmark has ended."""
        try:
            reply: dict[str, Any] = self._connection.recv()
        except (EOFError, OSError):
            raise SystemExit("the benchmark has ended") from None
        return reply

    def close(self) -> None:
        self._connection.close()
