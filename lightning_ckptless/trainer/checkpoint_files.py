"""The checkpoint files of one fit, kept in step with the versions that the run returns to.

Copies lie beside the file, under a hidden name without the suffix `.ckpt`: on the same file system, so that a rename is
all it takes, for a file and for the folder of a sharded model alike. `protocol.checkpoint_history` decides; what it
decides by is in the ledger and on the disk, so that a new process of rank 0 continues where a lost one was.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from lightning_ckptless.ledger import Ledger, read_ledger
from lightning_ckptless.protocol.checkpoint_history import (
    BEGINNING,
    Action,
    FileHistory,
    FileOperation,
    Found,
    Move,
    moves_to_return,
    moves_to_settle,
    note_of,
    note_of_begin,
    note_of_rewind,
    note_of_written,
    read_history,
)
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.lost_files import LostFile, lost_checkpoints, size_bytes

log = logging.getLogger(__name__)

WRITTEN_LAST = (".metadata", "meta.pt")
"""In the folder of a sharded model's checkpoint: of torch.distributed.checkpoint, and of Lightning."""
_NAMES_SHOWN = 3
_LONGEST_NAME_BYTES = 200
"""File systems allow 255, and the names of the copies are longer."""


class CheckpointFiles:
    """Checkpoint files of one call of `fit`, on the rank that writes them.

    Args:
        ledger: of the run.
        fit: how many fits of the program precede it.
        say: tells the user something.

    Attributes:
        lost: files that were missing or too short when the run returned to a version last.
    """

    def __init__(self, ledger: Ledger, fit: int, say: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._fit = fit
        self._say = say
        self.lost: list[LostFile] = []
        self._is_closed = False
        self._waiting: dict[str, Version] = {}
        self._rewritten: set[str] = set()
        self._of_later_fits: frozenset[str] = frozenset()

    # ------------------------------------------------------------------ as the trainer writes and removes

    def saving(self, path: str, after: Version | None, *, generation: int) -> None:
        """A file is about to be written.

        Args:
            path: as Lightning has it.
            after: the newest version that was taken; None before the first.
            generation: of this rank.
        """
        if self._is_closed:
            # Between two fits the program writes its files again by itself.
            return
        path = absolute(path)
        self._note(FileOperation(path, Action.SAVE, after or BEGINNING, _exists(path)), generation)
        self._rewritten.add(path)

    def written(self, path: str, *, generation: int) -> None:
        """A file has been written."""
        path = absolute(path)
        if not self._is_closed and not is_remote(path) and (size := size_bytes(path)) is not None:
            self._ledger.record("checkpoint", generation=generation, rank=0, **note_of_written(path, size, self._fit))

    def removing(self, path: str, after: Version | None, *, generation: int) -> bool:
        """A file is about to be removed.

        Returns:
            Whether that was dealt with: the file is held until a version includes its removal, or is a later fit's.
        """
        path = absolute(path)
        if self._is_closed or is_remote(path) or not os.path.lexists(path):
            return False
        if path in self._of_later_fits and path not in self._rewritten:
            return True
        self._note(FileOperation(path, Action.REMOVE, after or BEGINNING, existed=True), generation)
        held = _held(path, self._fit)
        if os.path.lexists(held):
            return False
        try:
            os.rename(path, held)
        except OSError as error:
            # In a folder of another user, say: whether the file can be removed is for Lightning to find out.
            log.debug("ckptless: %s is not held: %s", path, error)
            return False
        self._waiting[path] = after or BEGINNING
        return True

    def _note(self, operation: FileOperation, generation: int) -> None:
        self._ledger.record("checkpoint", generation=generation, rank=0, **note_of(operation, self._fit))

    # ------------------------------------------------------------------ as versions come and go

    def begin(self, *, generation: int, new_run: bool) -> None:
        """The fit begins without a version, so nothing that was noted before is written again.

        Args:
            generation: of this rank.
            new_run: whether it begins from nothing, and not from a checkpoint file of this run.
        """
        settle_fit(self._history(), self._fit)
        self._ledger.record("checkpoint", generation=generation, rank=0, **note_of_begin(self._fit, new_run=new_run))

    def go_back(self, version: Version, *, generation: int) -> None:
        """Make all files look as they did at a version. No file of another fit is touched."""
        self._rewritten.clear()
        self._waiting.clear()
        history = self._history()
        self._of_later_fits = history.of_later_fits
        first, aside, remote = history.first_after(version), list[str](), list[str]()
        for path in history.paths:
            if is_remote(path):
                remote += [path] if path in first and not history.is_saved_before(path, version) else []
                continue
            found = _found(path, self._fit)
            if path not in first:
                _carry_out(_settling(history, path, found), path, self._fit)
                continue
            moves = moves_to_return(first[path], found, of_later_fit=path in history.of_later_fits)
            _carry_out(moves, path, self._fit)
            aside += [path] if Move.SET_ASIDE in moves else []
            if os.path.lexists(_aside(path, self._fit)):
                self._waiting[path] = first[path].after
        self._ledger.record("checkpoint", generation=generation, rank=0, **note_of_rewind(version, self._fit))
        self._tell(version, aside, remote)
        # A file that is about to be written again may be torn: it was being written when a rank was lost.
        due = {path: history.written_bytes.get(path, 0) for path in history.present() - first.keys()}
        self.lost = lost_checkpoints({path: size for path, size in due.items() if not is_remote(path)})

    def settle(self, committed: Version | None) -> None:
        """Deal with the copies that were kept for steps which a committed version includes."""
        if self._waiting and committed is not None:
            for path in [path for path, after in self._waiting.items() if after < committed]:
                self._settle(path)

    def close(self) -> None:
        """The fit is over, and this process with nothing to run again: no copy stays."""
        self._is_closed = True
        for path in list(self._waiting):
            self._settle(path)

    def forget(self) -> None:
        """Another rank writes from here on."""
        self.lost = []
        self._waiting.clear()
        self._rewritten.clear()

    def _settle(self, path: str) -> None:
        del self._waiting[path]
        found, rewritten = _found(path, self._fit), path in self._rewritten
        moves = moves_to_settle(found, rewritten=rewritten, of_later_fit=path in self._of_later_fits)
        _carry_out(moves, path, self._fit)

    def _history(self) -> FileHistory:
        return read_history(_notes(self._ledger.path), self._fit)

    def _tell(self, version: Version, aside: list[str], remote: list[str]) -> None:
        if aside:
            verb, them = ("was", "it") if len(aside) == 1 else ("were", "them")
            self._say(
                f"set {_names(aside)} aside: {them if verb == 'was' else 'they'} {verb} written after {version}, which "
                f"the run returns to; the replay writes {them} again"
            )
        if remote:
            self._say(
                f"{_names(remote)} written after {version} cannot be set aside, because the storage is not a local "
                "file system: the replay may write a second file beside it, with -v1 in its name"
            )


def settle_run(ledger: Path) -> None:
    """Deal with the copies of all fits of a run that has ended for good."""
    notes = list(_notes(ledger))
    for fit in sorted({int(note["fit"]) for note in notes}):
        settle_fit(read_history(notes, fit), fit)


def settle_fit(history: FileHistory, fit: int) -> None:
    """Deal with all copies of one fit.

    Args:
        history: of the fit.
        fit: its number.
    """
    for path in history.paths:
        if not is_remote(path):
            _carry_out(_settling(history, path, _found(path, fit)), path, fit)


def absolute(path: str) -> str:
    """A path that another process understands, whatever its working directory."""
    path = path.removeprefix("file://")
    return path if is_remote(path) else os.path.abspath(path)


def is_remote(path: str) -> bool:
    """Whether a path is the URL of storage that is not a local file system."""
    return "://" in path


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has been written to its end: a file, or a folder of a sharded model with what comes last."""
    return path.is_file() or all((path / last).is_file() for last in WRITTEN_LAST)


def removes_by_path(checkpoint_io: Any) -> bool:
    """Whether a plugin of Lightning's removes a checkpoint by deleting its path, and nothing else with it."""
    owner: str = type(checkpoint_io).remove_checkpoint.__module__
    return owner.startswith(("lightning.", "lightning_fabric.")) and owner.endswith("plugins.io.torch_io")


def _settling(history: FileHistory, path: str, found: Found) -> list[Move]:
    return moves_to_settle(found, rewritten=path in history.saved(), of_later_fit=path in history.of_later_fits)


def _notes(ledger: Path) -> Iterable[Mapping[str, Any]]:
    return (event.fields for event in read_ledger(ledger, only="checkpoint"))


def _aside(path: str, fit: int) -> str:
    return _hidden(path, f"ckptless-aside-{fit}")


def _held(path: str, fit: int) -> str:
    return _hidden(path, f"ckptless-removed-{fit}")


def _hidden(path: str, suffix: str) -> str:
    folder, name = os.path.split(path)
    if len(os.fsencode(name)) > _LONGEST_NAME_BYTES:
        name = xxhash.xxh3_128_hexdigest(os.fsencode(name))
    return os.path.join(folder, f".{name}.{suffix}")


def _exists(path: str) -> bool:
    return not is_remote(path) and os.path.exists(path)


def _found(path: str, fit: int) -> Found:
    return Found(
        os.path.lexists(path), aside=os.path.lexists(_aside(path, fit)), held=os.path.lexists(_held(path, fit))
    )


def _carry_out(moves: Iterable[Move], path: str, fit: int) -> None:
    aside, held = _aside(path, fit), _held(path, fit)
    for move in moves:
        match move:
            case Move.SET_ASIDE:
                os.rename(path, aside)
            case Move.DELETE:
                _delete(path)
            case Move.DROP_ASIDE:
                if os.path.lexists(path) and not is_whole(Path(path)):
                    # Its writing was interrupted: the copy is the one that can be loaded.
                    _replace(aside, path)
                else:
                    _delete(aside)
            case Move.PUT_ASIDE_BACK:
                _replace(aside, path)
            case Move.PUT_HELD_BACK:
                _replace(held, path)
            case Move.DROP_HELD:
                _delete(held)


def _replace(copy: str, path: str) -> None:
    if os.path.lexists(path):
        _delete(path)
    os.rename(copy, path)


def _delete(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _names(paths: list[str]) -> str:
    shown = ", ".join(paths[:_NAMES_SHOWN])
    return shown if len(paths) <= _NAMES_SHOWN else f"{shown} and {len(paths) - _NAMES_SHOWN} more"
