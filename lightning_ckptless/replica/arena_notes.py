"""The notes in an arena: what a process has to know before its rendezvous with the other ranks.

Each note is a sealed record in its own file, so processes of a node may write different notes at the same time. A
damaged note is ignored, with one warning.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from lightning_ckptless.formats.schema import (
    PID,
    RANK,
    STEP,
    Check,
    Json,
    SchemaError,
    as_it_is,
    boolean,
    integer,
    number,
    optional,
    plain,
    record,
    refused,
    sequence,
    table,
    text,
)
from lightning_ckptless.formats.sealed import seal, unseal
from lightning_ckptless.protocol.durable_schedule import Share
from lightning_ckptless.protocol.retry_policy import RecoveryHistory
from lightning_ckptless.protocol.run_counts import RunCounts
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena_metadata import replace_file
from lightning_ckptless.replica.slot_stamp import GENERATION, WORLD_SIZE

log = logging.getLogger(__name__)

FORMAT = 2
_KIND = "note"
_PREFIX = "note-"
_WARNED: set[Path] = set()
"""Damaged notes for which this process has already logged a warning."""


@dataclass(frozen=True)
class RankFolders:
    """The folders that the script has chosen on one rank.

    Args:
        cwd: working directory.
        root: the trainer's default root folder.
        dirpaths: class name and output folder of each callback and of the profiler; None without a folder.
    """

    cwd: str
    root: str
    dirpaths: tuple[tuple[str, str | None], ...]

    @classmethod
    def from_value(cls, value: Any) -> RankFolders:
        """Decode the fields as read from JSON.

        Raises:
            SchemaError: the value does not match the schema.
        """
        folders: RankFolders = _RANK_FOLDERS(value, "folders")
        return folders


@dataclass(frozen=True)
class RecoveryRecord:
    """The recoveries of a run over all its relaunches.

    Args:
        history: the recoveries.
        step: optimizer step from which the run resumed after the last one.
    """

    history: RecoveryHistory
    step: int


@dataclass(frozen=True)
class ArenaNotes:
    """The notes of an arena. Those that are not recorded have their default value.

    Args:
        generation: number of the last generation.
        origin: checkpoint path from which the run was started; empty if it was started without one.
        finished: whether the run has finished.
        committed: newest version that the ranks have committed.
        recoveries: recoveries of the run, if an external agent does not count them.
        counts: what the run had counted when it left the training loop.
        folders: folders of each rank.
        logger_identities: the logger runs that rank 0 writes to.
        durable_share: share of this node in the writing of durable states.
        reaper_agent: process id of the external agent at whose exit a reaper removes the arena.
        writer_agent: process id of the external agent at whose exit the durable writer of this node exits.
        data_hooks: state that the data hooks of the user have made, by rank and name of the hook.
        raised: kind of the last exception of the script and the step before it, by rank.
    """

    generation: int | None = None
    origin: str | None = None
    finished: bool = False
    committed: Version | None = None
    recoveries: RecoveryRecord | None = None
    counts: RunCounts | None = None
    folders: tuple[RankFolders, ...] | None = None
    logger_identities: list[dict[str, Any]] | None = None
    durable_share: Share | None = None
    reaper_agent: int | None = None
    writer_agent: int | None = None
    data_hooks: Mapping[int, Mapping[str, str | None]] = field(default_factory=dict)
    raised: Mapping[int, str] = field(default_factory=dict)

    def to_values(self) -> dict[str, Json]:
        """Encode the notes that are set, by the names of the notes."""
        values: dict[str, Json] = {}
        for name, storage in _STORAGE.items():
            value = vars(self)[name]
            if storage.per_rank:
                values |= {f"{storage.name}{rank}": storage.encode(value[rank]) for rank in value}
            elif value != vars(_UNSET)[name]:
                values[storage.name] = storage.encode(value)
        return values

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> ArenaNotes:
        """Decode the result of `to_values`. Notes with unknown names are ignored.

        Raises:
            SchemaError: a value does not match the schema of its note.
        """
        decoded: dict[str, Any] = {name: {} for name, storage in _STORAGE.items() if storage.per_rank}
        for stored_name, stored in values.items():
            for name, storage in _STORAGE.items():
                if (match := _PATTERNS[name].fullmatch(stored_name)) is None:
                    continue
                value = storage.check(stored, stored_name)
                if storage.per_rank:
                    decoded[name][int(match[1])] = value
                else:
                    decoded[name] = value
        return cls(**decoded)

    @classmethod
    def merged(cls, arenas: Iterable[ArenaNotes]) -> ArenaNotes:
        """Each note as in the first arena in which it is recorded and not empty."""
        found: dict[str, Any] = {}
        for notes in arenas:
            found = {name: value for name, value in vars(notes).items() if value} | found
        return cls(**found)


_UNSET = ArenaNotes()


@dataclass(frozen=True)
class _Storage:
    """How a note is stored.

    Args:
        name: name of the note; if each rank has its own, the part before the rank.
        check: schema of the stored value; returns the value of the field.
        encode: returns the stored value, given that of the field.
        per_rank: whether each rank has its own note; the field is then a mapping by rank.
    """

    name: str
    check: Check
    encode: Callable[[Any], Json] = lambda value: value
    per_rank: bool = False


def _dirpath(value: Any, path: str) -> tuple[str, str | None]:
    name, folder = sequence(optional(text()), length=2)(value, path)
    return text()(name, f"{path}[0]"), folder


def _version(step: int, validation_done: bool) -> Version:
    return Version(step, validation_done)


def _recovery_record(step: int, **history: Any) -> RecoveryRecord:
    return RecoveryRecord(RecoveryHistory(**history), step)


_RANK_FOLDERS = record(RankFolders, cwd=text(), root=text(), dirpaths=sequence(_dirpath))
_STORAGE = {
    "generation": _Storage("generation", GENERATION),
    "origin": _Storage("origin", lambda value, path: optional(text())(value, path) or ""),
    "finished": _Storage("finished", boolean),
    "committed": _Storage(
        "committed",
        record(_version, step=STEP, validation_done=boolean),
        lambda version: {"step": version.optimizer_step, "validation_done": version.validation_done},
    ),
    "recoveries": _Storage(
        "recoveries",
        record(
            _recovery_record,
            count=integer(),
            without_progress=integer(),
            recent=sequence(number(), most=100_000),
            step=STEP,
        ),
        lambda recoveries: asdict(recoveries.history) | {"step": recoveries.step},
    ),
    "counts": _Storage(
        "counts",
        record(
            RunCounts,
            recoveries=integer(),
            failures=integer(),
            rewinds=integer(),
            steps_replayed=integer(),
            regrouped_at=number(),
        ),
        asdict,
    ),
    "folders": _Storage("folders", sequence(_RANK_FOLDERS), lambda ranks: [asdict(folders) for folders in ranks]),
    "logger_identities": _Storage(
        "logger_identities",
        optional(as_it_is(sequence(record(kind=text(), identity=table(text(), plain()))))),
    ),
    "durable_share": _Storage(
        "durable share",
        record(Share, shards=sequence(RANK), of=WORLD_SIZE, leads=boolean, every_n_steps=optional(integer(1))),
        asdict,
    ),
    "reaper_agent": _Storage("reaped with", PID),
    "writer_agent": _Storage("durable writer with", PID),
    "data_hooks": _Storage("data_hooks_", table(text(), optional(text(longest=1 << 30))), per_rank=True),
    "raised": _Storage("raised by rank ", text(), per_rank=True),
}
"""How each note is stored, by the name of its field."""
_PATTERNS = {
    name: re.compile(re.escape(storage.name) + (r"(\d+)" if storage.per_rank else ""))
    for name, storage in _STORAGE.items()
}
"""What the stored names look like, with the rank as a group; compiled before any new process needs it."""
_NOTE = record(name=text(), value=lambda value, _: value)


def write_notes(folder: Path, notes: ArenaNotes) -> None:
    """Write the notes that are set, and leave the others as they are.

    Raises:
        ArenaError: a note cannot be written.
        SchemaError: a value does not match the schema of its note, which is a bug in this package.
    """
    for name, value in notes.to_values().items():
        data = seal(_KIND, FORMAT, {"name": name, "value": value})
        read_note(data, name)
        replace_file(folder / f"{_PREFIX}{quote(name, safe='')}.json", data)


def read_notes(folder: Path) -> ArenaNotes:
    """Read all notes of an arena."""
    values: dict[str, Any] = {}
    files: list[str] = []
    with suppress(FileNotFoundError):
        files = [file for file in os.listdir(folder) if file.startswith(_PREFIX) and file.endswith(".json")]
    for path in map(folder.joinpath, sorted(files)):
        name = unquote(path.name.removeprefix(_PREFIX).removesuffix(".json"))
        try:
            values[name] = read_note(path.read_bytes(), name)
        except (OSError, SchemaError) as error:
            if path not in _WARNED:
                _WARNED.add(path)
                log.warning("ckptless: %s: ignoring a damaged note: %s", path, error)
    return ArenaNotes.from_values(values)


def read_note(data: bytes, name: str) -> Any:
    """The stored value of a note.

    Args:
        data: content of the file.
        name: name of the note.

    Raises:
        SchemaError: the note is damaged, or its value does not match the schema of this name.
    """
    note: dict[str, Any] = unseal(data, _KIND, FORMAT, _NOTE)
    if note["name"] != name:
        raise refused("name", name, note["name"])
    ArenaNotes.from_values({name: note["value"]})
    return note["value"]
