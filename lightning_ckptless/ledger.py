"""The ledger of a run: what happened, one JSON object per line, over all its generations.

Each line ends with the number of the format and a checksum of itself.

The agent and rank 0 append to the same file. A line is one write to a file opened for appending, so lines of two
writers do not mix. The ledger never stops a run: what cannot be written is reported once and dropped.
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
from lightning_ckptless.formats.events import read_line, seal_line
from lightning_ckptless.formats.schema import SchemaError

log = logging.getLogger(__name__)

LEDGER_NAME = "ledger.jsonl"


def run_folder(run_root: str | os.PathLike[str], run_id: str) -> Path:
    """The folder of a run.

    Args:
        run_root: folder of all runs.
        run_id: name of the run.

    Raises:
        OptionsError: the run id is not the name of a folder.
    """
    if not run_id or run_id in (".", "..") or "/" in run_id or "\0" in run_id:
        raise OptionsError(f"run id {run_id!r}: expected a name that can be one folder in {os.fspath(run_root)!r}")
    return Path(run_root) / run_id


class Ledger:
    """Appends events to the ledger of a run. Holds no file open and may be used by several threads.

    Args:
        path: of the file; it and its folder are made when the first event is recorded.
        clock: seconds since the epoch.
    """

    def __init__(self, path: str | os.PathLike[str], clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path)
        self._clock = clock
        self._warned = False
        self._torn = False

    def record(self, event: str, *, generation: int | None = None, rank: int | None = None, **fields: Any) -> None:
        """Append an event.

        Args:
            event: what happened.
            generation: number of the membership in which it happened.
            rank: who tells; None for an agent.
            fields: the facts, of values that JSON has; others are written as strings.
        """
        line = {"event": event, "at": self._clock(), "generation": generation, "rank": rank, **fields}
        try:
            self._append(seal_line(json.dumps(line, default=str).encode()) + b"\n")
        except OSError as error:
            if not self._warned:
                # In words: whoever keeps the record would keep the error with all that its frames hold.
                log.warning("%s cannot be written, events are missing from here on: %s", self.path, str(error))
            self._warned = True

    def _append(self, line: bytes) -> None:
        if self._torn:
            # The line before was cut short: its rest must not swallow this one.
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
            raise OSError(f"{written_bytes} of {len(line)} bytes were written")


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a ledger.

    Args:
        event: what happened.
        at: when, in seconds since the epoch.
        generation: number of the membership; None where there was none yet.
        rank: who tells; None for an agent.
        fields: the facts.
    """

    event: str
    at: float
    generation: int | None
    rank: int | None
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Events:
    """What was read from a ledger.

    Args:
        events: in the order in which they were written.
        skipped_lines: lines that are damaged, or do not have what their event must have.
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
        path: of the file; one that does not exist holds no events.
        only: name of the events that are wanted; empty for all. The others are not even looked into.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return Events(())
    if only:
        start = f'{{"event": "{only}"'.encode()
        lines = [line for line in lines if line.startswith(start)]
    events = [_event(line) for line in lines if line]
    whole = tuple(event for event in events if event is not None)
    return Events(whole, len(events) - len(whole))


def _event(line: bytes) -> Event | None:
    try:
        fields = read_line(line)
    except SchemaError:
        return None
    head = {name: fields.pop(name, None) for name in ("event", "at", "generation", "rank")}
    return Event(**head, fields=fields)
