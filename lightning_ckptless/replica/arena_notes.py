"""The notes in an arena: small named values that a process reads before its rendezvous with the other ranks.

Each note is a sealed record in its own file. A damaged note is ignored, with one warning.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from lightning_ckptless.formats.schema import (
    Check,
    SchemaError,
    as_it_is,
    boolean,
    integer,
    number,
    optional,
    plain,
    record,
    sequence,
    table,
    text,
)
from lightning_ckptless.formats.sealed import seal, unseal
from lightning_ckptless.replica.arena_metadata import replace_file
from lightning_ckptless.replica.arena_owner import HIGHEST_PID
from lightning_ckptless.replica.slot_stamp import GENERATION, RANK, STEP, WORLD_SIZE

log = logging.getLogger(__name__)

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
"""The value of a note."""

FORMAT = 2
_KIND = "note"
_PREFIX = "note-"
_PID = integer(1, HIGHEST_PID)
_FOLDER = text()
_KINDS: tuple[tuple[str, Check], ...] = (
    ("generation", GENERATION),
    ("origin", optional(text())),
    ("finished", boolean),
    ("committed", record(step=STEP, validation_done=boolean)),
    ("recoveries", record(
        count=integer(), without_progress=integer(), recent=sequence(number(), most=100_000), step=STEP
    )),
    ("folders", sequence(record(
        cwd=_FOLDER, root=_FOLDER, dirpaths=sequence(sequence(optional(_FOLDER), length=2))
    ))),
    ("logger_identities", optional(sequence(record(kind=text(), identity=table(text(), plain()))))),
    (r"data_hooks_\d+", table(text(), optional(text(longest=1 << 30)))),
    (r"raised by rank \d+", text()),
    ("reaped with|durable writer with", _PID),
    ("durable share", record(
        shards=sequence(RANK), of=WORLD_SIZE, leads=boolean, every_n_steps=optional(integer(1))
    )),
)  # fmt: skip
"""The schema of each note, by a pattern of its name."""
_WARNED: set[Path] = set()
"""Damaged notes for which this process has already logged a warning."""


def write_note(folder: Path, name: str, value: Json) -> None:
    """Write a note.

    Raises:
        ArenaError: the note cannot be written.
        SchemaError: the value does not match the schema of the note, which is a bug in this package.
    """
    data = seal(_KIND, FORMAT, {"name": name, "value": value})
    read_note(data, name)
    replace_file(folder / f"{_PREFIX}{quote(name, safe='')}.json", data)


def read_notes(folder: Path) -> dict[str, Any]:
    """Read all notes of an arena."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob(f"{_PREFIX}*.json")):
        name = unquote(path.name.removeprefix(_PREFIX).removesuffix(".json"))
        try:
            found[name] = read_note(path.read_bytes(), name)
        except (OSError, SchemaError) as error:
            if path not in _WARNED:
                _WARNED.add(path)
                log.warning("ckptless: %s: ignoring a damaged note: %s", path, error)
    return found


def read_note(data: bytes, name: str) -> Any:
    """The value of a note.

    Args:
        data: content of the file.
        name: name of the note.

    Raises:
        SchemaError: the note is damaged, or its value does not match the schema of this name.
    """
    value = as_it_is(next((check for names, check in _KINDS if re.fullmatch(names, name)), plain()))
    note: dict[str, Any] = unseal(data, _KIND, FORMAT, record(name=text(re.escape(name)), value=value))
    return note["value"]
