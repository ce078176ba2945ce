"""Notes from workers to the benchmark over a unix socket: what happened when, as it happens.

A worker says one line of JSON per moment; the kernel says when it is gone. So the benchmark waits for events, never
for a guess of how long they take. The benchmark may answer: a worker that asked waits for the line.
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
"""Written out, because nothing of ours is imported here: when imports begin is measured."""
SOCKET = "CKPTLESS_BENCH_SOCKET"
"""Environment variable with the path of the benchmark's socket."""


@dataclass(frozen=True, eq=False)
class Note:
    """What a worker said.

    Args:
        moment: name of what happened; `gone` when the worker's end of the wire was closed.
        at: wall clock, seconds since the epoch.
        pid: the worker's process id; 0 when it never said a word.
        rank: the worker's rank; -1 while it has none.
        fields: what else it said.
        wire: its connection.
    """

    moment: str
    at: float
    pid: int
    rank: int
    fields: dict[str, Any]
    wire: socket.socket

    def answer(self, **fields: Any) -> None:
        """Say a line to the worker."""
        self.wire.sendall(json.dumps(fields).encode() + b"\n")


@dataclass
class _Heard:
    """One connection: what came in after the last whole line, and who is at the other end."""

    rest: bytes = b""
    pid: int = 0
    rank: int = -1


@dataclass
class Desk:
    """The benchmark's end of the wires.

    Args:
        path: of the socket, at most 100 characters.
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
        """The next note, waiting at most so long for it."""
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
            self._selector.register(wire, selectors.EVENT_READ, _Heard())
            return
        assert isinstance(key.fileobj, socket.socket)
        wire, heard = key.fileobj, key.data
        try:
            data = wire.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(wire)
            self._notes.append(Note("gone", time.time(), heard.pid, heard.rank, {}, wire))
            wire.close()
            return
        *lines, heard.rest = (heard.rest + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            heard.pid, heard.rank = said.pop("pid"), said.pop("rank")
            self._notes.append(Note(said.pop("moment"), said.pop("at"), heard.pid, heard.rank, said, wire))

    def close(self) -> None:
        """Hang up."""
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
    """A worker's end.

    Args:
        path: of the benchmark's socket.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._lock = threading.Lock()

    def say(self, moment: str, *, at: float | None = None, **fields: Any) -> None:
        """Say what has happened. Any thread."""
        # A standby has the variables of a rank, and no rank.
        named = "-1" if STANDBY in os.environ else os.environ.get("RANK", os.environ.get("LOCAL_RANK", "-1"))
        rank = int(named)
        note = {"moment": moment, "at": time.time() if at is None else at, "pid": os.getpid(), "rank": rank, **fields}
        with self._lock:
            self._socket.sendall(json.dumps(note).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        """Wait for a line from the benchmark; it is over when there is none."""
        line = self._lines.readline()
        if not line:
            raise SystemExit("the benchmark has ended")
        heard: dict[str, Any] = json.loads(line)
        return heard

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()
