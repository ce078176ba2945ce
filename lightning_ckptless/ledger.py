"""The ledger of a run: its events over all generations, one JSON object per line.

Each line ends with the format number and a checksum of the line.

The agent and rank 0 append to the same file. A line is a single write to a file opened with O_APPEND, so lines of two
writers do not interleave. The ledger never stops a run: a failed write is reported once and the event is dropped.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.formats.ledger_events import read_line, seal_line
from lightning_ckptless.formats.schema import SchemaError

log = logging.getLogger(__name__)

LEDGER_NAME = "ledger.jsonl"


def run_folder(run_root: str | os.PathLike[str], run_id: str) -> Path:
    """Return the folder of a run.

    Args:
        run_root: folder of all runs.
        run_id: id of the run.

    Raises:
        OptionsError: the run id is not a valid folder name.
    """
    if not run_id or run_id in (".", "..") or "/" in run_id or "\0" in run_id:
        raise OptionsError(f"run id {run_id!r}: expected the name of a single folder in {os.fspath(run_root)!r}")
    return Path(run_root) / run_id


class Ledger:
    """Appends events to the ledger of a run. Keeps no file open and may be used by several threads.

    Args:
        path: path of the file; created with its folder when the first event is recorded.
        clock: returns the time in seconds since the epoch.
    """

    def __init__(self, path: str | os.PathLike[str], clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path)
        self._clock = clock
        self._warned = False
        self._torn = False

    def record(self, event: str, *, generation: int | None = None, rank: int | None = None, **fields: Any) -> None:
        """Append an event.

        Args:
            event: name of the event.
            generation: generation in which it happened.
            rank: rank that reports it; None for an agent.
            fields: details; values that JSON cannot represent are written as strings.
        """
        line = {"event": event, "at": self._clock(), "generation": generation, "rank": rank, **fields}
        try:
            self._append(seal_line(json.dumps(line, default=str).encode()) + b"\n")
        except OSError as error:
            if not self._warned:
                # First, because a handler may record the warning in this ledger.
                self._warned = True
                # As text: a handler that keeps the log record must not keep the frames of the error alive.
                log.warning("%s: cannot write, later events will be missing: %s", self.path, str(error))

    def _append(self, line: bytes) -> None:
        if self._torn:
            # The previous line was truncated. Start a new line, so that this one can be read.
            line = b"\n" + line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o644)
        try:
            written_bytes = os.write(descriptor, line)
        finally:
            os.close(descriptor)
        self._torn = written_bytes < len(line)
        if self._torn:
            raise OSError(f"wrote only {written_bytes} of {len(line)} bytes")


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a ledger.

    Args:
        event: name of the event.
        at: time in seconds since the epoch.
        generation: generation in which it happened; None before the first.
        rank: rank that reported it; None for an agent.
        fields: details.
    """

    event: str
    at: float
    generation: int | None
    rank: int | None
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Events:
    """The events read from a ledger.

    Args:
        events: events in the order in which they were written.
        skipped_lines: lines that are damaged or lack a field that their event requires.
    """

    events: tuple[Event, ...]
    skipped_lines: int = 0

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)


def read_ledger(path: str | os.PathLike[str], *, only: str = "") -> Events:
    """Read a ledger, which may be written to at the same time.

    Args:
        path: path of the file; a missing file counts as empty.
        only: name of the events to return; empty for all. Lines of other events are not parsed.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return Events(())
    if only:
        start = f'{{"event": "{only}"'.encode()
        lines = [line for line in lines if line.startswith(start)]
    events = [_event(line) for line in lines if line]
    valid = tuple(event for event in events if event is not None)
    return Events(valid, len(events) - len(valid))


class LedgerTail:
    """Reads a ledger piece by piece, while it is written.

    Args:
        path: path of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._read_bytes = 0

    def read(self) -> tuple[Event, ...]:
        """Return the events that have been added since the last call. A line without its end is left for later."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                added = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return ()
        complete = added[: added.rfind(b"\n") + 1]
        self._read_bytes += len(complete)
        events = (_event(line) for line in complete.splitlines() if line)
        return tuple(event for event in events if event is not None)


def _event(line: bytes) -> Event | None:
    try:
        fields = read_line(line)
    except SchemaError:
        return None
    head = {name: fields.pop(name, None) for name in ("event", "at", "generation", "rank")}
    return Event(**head, fields=fields)
