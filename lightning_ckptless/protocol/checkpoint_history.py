"""The history of a run's checkpoint files, and what a rollback does with them.

A rollback returns to a version. The steps after it are replayed and write their checkpoint files again. The replay must
find the files as they were at that version: otherwise `ModelCheckpoint` sees its own file and writes a second one with
the suffix `-v1`. A file written after the version is therefore *set aside* until the replay has passed the step that
wrote it. A removed file is *held* until a version that includes its removal is committed, so that a rollback can
restore it.

Operations are recorded per call of `fit`. The files of one fit are never touched on behalf of another.

| Note | Meaning |
|---|---|
| `save` | a file is about to be written |
| `written` | the file has been written; includes its size |
| `remove` | a file is about to be removed |
| `rewind` | the fit returned to a version, which undoes its later operations |
| `abandon` | the run was rewound to a version on request: files written after it stay, and belong to no later step |
| `begin` | the fit started without a version: notes of an earlier run with the same id are ignored |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lightning_ckptless.protocol.versions import Version

BEGINNING = Version(-1, False)
"""Precedes every version."""


class Action(StrEnum):
    """The kind of a note."""

    SAVE = "save"
    WRITTEN = "written"
    REMOVE = "remove"
    REWIND = "rewind"
    ABANDON = "abandon"
    BEGIN = "begin"


@dataclass(frozen=True, slots=True)
class FileOperation:
    """A checkpoint file was written or removed.

    Args:
        path: absolute path or URL.
        action: `SAVE` or `REMOVE`.
        after: newest version at the time of the operation.
        existed: whether the file existed before the operation.
    """

    path: str
    action: Action
    after: Version
    existed: bool


@dataclass(frozen=True, slots=True)
class FileHistory:
    """The operations of one fit.

    Args:
        live: operations that are part of the run, in order.
        undone: operations that a rollback undid, in order.
        returned_to: version of the last rollback.
        of_later_fits: paths last written by a later fit, which a relaunched script reaches again.
        written_bytes: size of each file when it was last written.
    """

    live: tuple[FileOperation, ...] = ()
    undone: tuple[FileOperation, ...] = ()
    returned_to: Version = BEGINNING
    of_later_fits: frozenset[str] = frozenset()
    written_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """All paths, in order of first operation."""
        return list(dict.fromkeys(operation.path for operation in (*self.live, *self.undone)))

    def first_after(self, version: Version) -> dict[str, FileOperation]:
        """The first operation on each path that a version does not include; live operations take precedence."""
        first: dict[str, FileOperation] = {}
        for operation in (*self.live, *self.undone):
            if operation.after >= version:
                first.setdefault(operation.path, operation)
        return first

    def written_after(self, version: Version) -> list[str]:
        """Paths that were written after a version and not removed since, in order of their first operation."""
        last = {operation.path: operation for operation in self.live if operation.after >= version}
        return [path for path, operation in last.items() if operation.action is Action.SAVE]

    def is_saved_before(self, path: str, version: Version) -> bool:
        """Whether a version includes the writing of a file."""
        return any(operation.path == path and operation.after < version for operation in self.live)

    def set_aside_after(self, path: str) -> Version | None:
        """The version that precedes the step for which a copy is set aside.

        Returns:
            The version before the first write that the last rollback undid, or before the first undone operation of
            any kind if a later fit wrote the file. None if nothing was undone.
        """
        undone = self._since_return(self.undone, path)
        if path not in self.of_later_fits:
            undone = [operation for operation in undone if operation.action is Action.SAVE]
        return min((operation.after for operation in undone), default=None)

    def is_rewritten(self, path: str, before: Version | None = None) -> bool:
        """Whether the replay since the last rollback has written a file again.

        Args:
            path: path of the file.
            before: count only writes that this version includes; None for all.
        """
        written = (it for it in self._since_return(self.live, path) if it.action is Action.SAVE)
        return any(before is None or operation.after < before for operation in written)

    def removals(self, path: str) -> list[Version]:
        """The versions after which a file was removed, in ascending order."""
        operations = (*self.live, *self.undone)
        return sorted({it.after for it in operations if it.path == path and it.action is Action.REMOVE})

    def _since_return(self, operations: Iterable[FileOperation], path: str) -> list[FileOperation]:
        return [it for it in operations if it.path == path and it.after >= self.returned_to]

    def present(self) -> frozenset[str]:
        """Paths of the files that exist according to the live operations."""
        last = {operation.path: operation.action for operation in self.live}
        return frozenset(path for path, action in last.items() if action is Action.SAVE)


def note_of(operation: FileOperation, fit: int) -> dict[str, Any]:
    """The ledger note of an operation."""
    return {
        "action": operation.action.value,
        "fit": fit,
        "path": operation.path,
        "existed": operation.existed,
        **_version_fields(operation.after),
    }


def note_of_written(path: str, size_bytes: int, fit: int) -> dict[str, Any]:
    """The note that a file has been written."""
    return {"action": Action.WRITTEN.value, "fit": fit, "path": path, "bytes": size_bytes}


def note_of_rewind(version: Version, fit: int) -> dict[str, Any]:
    """The note that a fit returns to a version."""
    return {"action": Action.REWIND.value, "fit": fit, **_version_fields(version)}


def note_of_abandon(version: Version, fit: int) -> dict[str, Any]:
    """The note that the run was rewound to a version on request."""
    return {"action": Action.ABANDON.value, "fit": fit, **_version_fields(version)}


def note_of_begin(fit: int, *, new_run: bool) -> dict[str, Any]:
    """The note that a fit starts without a version.

    Args:
        fit: index of the fit.
        new_run: whether the run is new, so that its later fits start from scratch as well.
    """
    return {"action": Action.BEGIN.value, "fit": fit, "new_run": new_run}


def read_history(notes: Iterable[Mapping[str, Any]], fit: int) -> FileHistory:
    """The history of one fit.

    Args:
        notes: notes of all fits, in the order in which they were written.
        fit: index of the fit.
    """
    live: list[FileOperation] = []
    undone: list[FileOperation] = []
    returned_to = BEGINNING
    writers: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for note in notes:
        action, of = Action(note["action"]), int(note["fit"])
        if action is Action.BEGIN:
            is_new_run = bool(note["new_run"])
            if of == fit or (of < fit and is_new_run):
                live, undone, returned_to = [], [], BEGINNING
            if is_new_run:
                writers = {path: writer for path, writer in writers.items() if writer < of}
        elif action is Action.REWIND and of == fit:
            returned_to = _version(note)
            undone += [operation for operation in live if operation.after >= returned_to]
            live = [operation for operation in live if operation.after < returned_to]
        elif action is Action.ABANDON and of == fit:
            # Nothing of the abandoned branch is written again, so none of its files is ever in the way.
            live, undone, returned_to = [op for op in live if op.after < _version(note)], [], BEGINNING
        elif action is Action.WRITTEN:
            # The last writer determines the expected size, whichever fit it belongs to.
            sizes[note["path"]] = int(note["bytes"])
        elif action in (Action.SAVE, Action.REMOVE):
            if action is Action.SAVE:
                writers[note["path"]] = max(of, writers.get(note["path"], 0))
            if of == fit:
                live.append(FileOperation(note["path"], action, _version(note), bool(note["existed"])))
    later = frozenset(path for path, writer in writers.items() if writer > fit)
    return FileHistory(tuple(live), tuple(undone), returned_to, later, sizes)


class Move(StrEnum):
    """An action on a file or on one of its copies."""

    SET_ASIDE = "set aside"
    DELETE = "delete"
    PUT_ASIDE_BACK = "put back what was set aside"
    DROP_ASIDE = "drop what was set aside"
    PUT_HELD_BACK = "put back what was held"


@dataclass(frozen=True, slots=True)
class Found:
    """What exists on disk for one path.

    Args:
        exists: whether the file itself exists.
        aside: whether a copy is set aside.
        held: whether a removed file is held that the version in question includes.
    """

    exists: bool
    aside: bool = False
    held: bool = False


def moves_to_return(first: FileOperation, found: Found, *, of_later_fit: bool) -> list[Move]:
    """The moves that restore a path to its state at a version.

    Args:
        first: first operation on the path after that version.
        found: what exists on disk.
        of_later_fit: whether a later fit wrote the file. It is then always set aside, never overwritten by the replay.
    """
    was_there = first.action is Action.REMOVE or first.existed
    is_in_the_way = found.exists and (not was_there or found.held or of_later_fit)
    moves = [Move.DELETE if found.aside else Move.SET_ASIDE] if is_in_the_way else []
    return [*moves, Move.PUT_HELD_BACK] if was_there and found.held else moves


def moves_to_settle(found: Found, *, rewritten: bool, of_later_fit: bool) -> list[Move]:
    """The moves for a set-aside copy once the run has passed the step that wrote it.

    Args:
        found: what exists on disk; an incomplete file does not count as existing.
        rewritten: whether the replay has written the file again.
        of_later_fit: whether a later fit wrote the file; if so, the set-aside copy is the one to keep.
    """
    if not found.aside:
        return []
    # If the replay wrote the file and it no longer exists, the replay also removed it, as an undisturbed run does.
    keeps_what_is_there = not of_later_fit and (rewritten or found.exists)
    return [Move.DROP_ASIDE if keeps_what_is_there else Move.PUT_ASIDE_BACK]


def _version_fields(version: Version) -> dict[str, Any]:
    return {"after_step": version.optimizer_step, "after_tail": version.validation_done}


def _version(note: Mapping[str, Any]) -> Version:
    return Version(int(note["after_step"]), bool(note["after_tail"]))
