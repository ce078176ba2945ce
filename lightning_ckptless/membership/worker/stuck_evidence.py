"""Evidence of a thread that is stuck in a collective, for the ledger.

The process's threads and the contents of its sockets show whether gloo has lost the thread. Both are lost when the
process is replaced, so they are recorded first.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_SELF = Path("/proc/self")
_MOST_LINES = 64
_MOST_FRAMES = 8
_TCP_STATES = (
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
)
"""Ordered by the kernel's numbers, from 1."""


def evidence() -> dict[str, list[str]]:
    """Describe the threads of this process, with or without Python frames, and its TCP sockets, one line each."""
    return {"threads": list(_threads())[:_MOST_LINES], "sockets": list(_sockets())[:_MOST_LINES]}


def python_threads() -> Iterator[tuple[int, threading.Thread, FrameType]]:
    """Yield the threads that run Python, with thread id and current frame."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        # After a fork, Python still has the parent's id of the main thread.
        number = os.getpid() if thread is threading.main_thread() else thread.native_id
        if frame is not None and number is not None:
            yield number, thread, frame


def _threads() -> Iterator[str]:
    known = {number: f"{thread.name} in {_where(frame)}" for number, thread, frame in python_threads()}
    for number in sorted(int(name) for name in os.listdir(_SELF / "task")):
        folder = _SELF / "task" / str(number)
        stat = _read(folder / "stat").rpartition(")")[2].split()
        if len(stat) > 12:
            yield (
                f"{number} {_read(folder / 'comm')}: state {stat[0]}, {int(stat[11]) + int(stat[12])} ticks, "
                f"wchan {_read(folder / 'wchan') or '?'}, syscall {_read(folder / 'syscall').split(' ')[0] or '?'}, "
                f"{known.get(number, 'no Python frame')}"
            )


def _where(frame: FrameType | None) -> str:
    places: list[str] = []
    while frame is not None and len(places) < _MOST_FRAMES:
        places.append(f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(places)


def _sockets() -> Iterator[str]:
    inodes: dict[str, str] = {}
    for name in os.listdir(_SELF / "fd"):
        try:
            target = os.readlink(_SELF / "fd" / name)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes[target.removeprefix("socket:[").removesuffix("]")] = name
    for table in ("tcp", "tcp6"):
        for line in _read(_SELF / "net" / table).splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[9] in inodes:
                unsent, _, unread = fields[4].partition(":")
                yield (
                    f"fd {inodes[fields[9]]}: {_address(fields[1])} -> {_address(fields[2])} {_state(fields[3])}, "
                    f"{int(unsent, 16)} bytes not acknowledged, {int(unread, 16)} not read"
                )


def _address(text: str) -> str:
    """Parse an address of `/proc/net/tcp`, whose four-byte words are in the byte order of the machine."""
    words, _, port = text.partition(":")
    raw = b"".join(int(words[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(words), 8))
    host = socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
    return f"{host.removeprefix('::ffff:')}:{int(port, 16)}"


def _state(text: str) -> str:
    number = int(text, 16)
    return _TCP_STATES[number - 1] if 0 < number <= len(_TCP_STATES) else f"state {number}"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
