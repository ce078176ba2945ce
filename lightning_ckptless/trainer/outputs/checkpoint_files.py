"""The checkpoint files of one fit, rolled back together with the run.

`protocol.checkpoint_history` decides, `checkpoint_copies` moves the files. Decisions depend only on the ledger and the
file system, so that a replacement of rank 0 can continue.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_ckptless.ledger import read_ledger
from lightning_ckptless.protocol.checkpoint_history import (
    BEGINNING,
    Action,
    FileHistory,
    FileOperation,
    Move,
    moves_to_return,
    moves_to_settle,
    note_of,
    note_of_abandon,
    note_of_begin,
    note_of_rewind,
    note_of_written,
    read_history,
)
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.outputs.checkpoint_copies import Copies, is_whole
from lightning_ckptless.trainer.outputs.lost_files import LostFile, lost_checkpoints, size_bytes
from lightning_ckptless.trainer.reporting.rank_ledger import RankLedger

log = logging.getLogger(__name__)

_NAMES_SHOWN = 3


class CheckpointFiles:
    """Checkpoint files of one call of `fit`, on the rank that writes them.

    Args:
        ledger: ledger of the run.
        fit: fit index.
        say: prints a message for the user.

    Attributes:
        lost: files that were missing or too short at the last rollback.
    """

    def __init__(self, ledger: RankLedger, fit: int, say: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._fit = fit
        self._say = say
        self.lost: list[LostFile] = []
        self._is_closed = False
        self._aside: dict[str, Version] = {}
        self._held: set[tuple[str, Version]] = set()
        self._rewritten: set[str] = set()
        self._of_later_fits: frozenset[str] = frozenset()

    # ------------------------------------------------------------------ while the trainer writes and removes files

    def saving(self, path: str, after: Version | None) -> None:
        """Record that a file is about to be written.

        Args:
            path: path as given by Lightning.
            after: the newest captured version; None before the first.
        """
        if self._is_closed:
            # Between two fits the script rewrites its files itself.
            return
        path = absolute(path)
        self._note(FileOperation(path, Action.SAVE, after or BEGINNING, _exists(path)))
        self._rewritten.add(path)

    def written(self, path: str) -> None:
        """Record that a file has been written."""
        path = absolute(path)
        if not self._is_closed and not is_remote(path) and (size := size_bytes(path)) is not None:
            self._ledger.record("checkpoint", **note_of_written(path, size, self._fit))

    def removing(self, path: str, after: Version | None) -> bool:
        """Called before a file is removed.

        Returns:
            Whether the removal has been handled: the file is held until a version includes the removal, or it belongs
            to a later fit.
        """
        path = absolute(path)
        if self._is_closed or is_remote(path) or not os.path.lexists(path):
            return False
        if path in self._of_later_fits and path not in self._rewritten:
            return True
        after = after or BEGINNING
        self._note(FileOperation(path, Action.REMOVE, after, existed=True))
        copies = Copies(path, self._fit)
        if copies.is_held(after):
            return False
        try:
            copies.hold(after)
        except OSError as error:
            # For example in another user's folder: Lightning will find out whether the file can be removed.
            log.debug("ckptless: %s cannot be held back: %s", path, error)
            return False
        self._held.add((path, after))
        return True

    def _note(self, operation: FileOperation) -> None:
        self._ledger.record("checkpoint", **note_of(operation, self._fit))

    # ------------------------------------------------------------------ commits and rollbacks

    def begin(self, *, new_run: bool) -> None:
        """Start the fit without a version: none of the recorded operations will be replayed.

        Args:
            new_run: whether the fit starts from scratch rather than from a checkpoint file of this run.
        """
        settle_fit(self._history(), self._fit)
        self._ledger.record("checkpoint", **note_of_begin(self._fit, new_run=new_run))

    def roll_back(self, version: Version) -> None:
        """Roll all files back to a version. Files of other fits are left alone."""
        self.forget()
        history = self._history()
        self._of_later_fits = history.of_later_fits
        first, aside, remote = history.first_after(version), list[str](), list[str]()
        for path in history.paths:
            if not is_remote(path):
                aside += [path] if self._return_path(path, history, version, first.get(path)) else []
            elif path in first and not history.is_saved_before(path, version):
                remote.append(path)
        self._ledger.record("checkpoint", **note_of_rewind(version, self._fit))
        undone = self._history()
        self._aside = {path: after for path in undone.paths if (after := undone.set_aside_after(path)) is not None}
        self._report(version, aside, remote)
        # Files that the replay rewrites are not checked: they may have been half written when a rank was lost.
        due = {path: history.written_bytes.get(path, 0) for path in history.present() - first.keys()}
        self.lost = lost_checkpoints({path: size for path, size in due.items() if not is_remote(path)})

    def abandon(self, version: Version) -> None:
        """Go back to a version on request. Files written after it stay where they are, and are named to the user.

        The replay may differ from what wrote them. Lightning gives a second file of the same name the suffix `-v1`.
        """
        history = self._history()
        for path in list(self._aside):
            self._settle(path)
        for path in history.paths:
            copies = Copies(path, self._fit)
            if not is_remote(path) and (held := copies.first_held(history, version)) is not None and not _exists(path):
                copies.carry_out([Move.PUT_HELD_BACK], held)
        self.forget()
        left = [path for path in history.written_after(version) if is_remote(path) or _exists(path)]
        self._ledger.record("checkpoint", **note_of_abandon(version, self._fit))
        if left:
            self._ledger.record("abandoned_files", version=str(version), paths=left)
            which = "was" if len(left) == 1 else "were"
            self._say(
                f"{_names(left)} {which} written after {version}, to which the run is rewound: the weights in "
                f"{'it are' if len(left) == 1 else 'them are'} of the abandoned branch"
            )

    def settle(self, committed: Version | None, oldest: Version | None) -> None:
        """Remove the copies that were kept for steps which a version includes.

        Args:
            committed: the newest committed version, which the replay after a fault includes.
            oldest: the oldest version that the run can be rewound to: removed files are held until then.
        """
        if committed is None or oldest is None:
            return
        for path in [path for path, after in self._aside.items() if after < committed]:
            self._settle(path)
        for path, after in [held for held in self._held if held[1] < oldest]:
            self._drop(path, after)

    def close(self) -> None:
        """Remove all copies: the fit has returned and nothing will be replayed."""
        self._is_closed = True
        for path in list(self._aside):
            self._settle(path)
        for path, after in list(self._held):
            self._drop(path, after)

    def forget(self) -> None:
        """Forget the state of the files; another rank writes them from now on."""
        self.lost = []
        self._aside.clear()
        self._held.clear()
        self._rewritten.clear()

    def _return_path(self, path: str, history: FileHistory, version: Version, first: FileOperation | None) -> bool:
        """Roll one path back to a version.

        Returns:
            Whether the file was set aside.
        """
        copies = Copies(path, self._fit)
        written = history.set_aside_after(path)
        if written is not None and written < version:
            # The version includes the step that the copy was kept for.
            rewritten = history.is_rewritten(path, before=version)
            copies.carry_out(_settling(copies, rewritten=rewritten, of_later_fit=path in history.of_later_fits))
        held = copies.first_held(history, version)
        if first is None:
            return False
        moves = moves_to_return(first, copies.found(held), of_later_fit=path in history.of_later_fits)
        copies.carry_out(moves, held)
        if held is not None:
            copies.drop_held(held)
        return Move.SET_ASIDE in moves

    def _settle(self, path: str) -> None:
        del self._aside[path]
        rewritten, of_later_fit = path in self._rewritten, path in self._of_later_fits
        copies = Copies(path, self._fit)
        copies.carry_out(_settling(copies, rewritten=rewritten, of_later_fit=of_later_fit))

    def _drop(self, path: str, after: Version) -> None:
        self._held.remove((path, after))
        Copies(path, self._fit).drop_held(after)

    def _history(self) -> FileHistory:
        return read_history(_notes(self._ledger.path), self._fit)

    def _report(self, version: Version, aside: list[str], remote: list[str]) -> None:
        if aside:
            verb, them = ("was", "it") if len(aside) == 1 else ("were", "them")
            self._say(
                f"set {_names(aside)} aside: {them if verb == 'was' else 'they'} {verb} written after {version}, to "
                f"which the run rolls back; the replay writes {them} again"
            )
        if remote:
            self._say(
                f"{_names(remote)} written after {version} cannot be set aside, because the storage is not a local "
                "file system: the replay may write a second file with -v1 in its name"
            )


def settle_run(ledger: Path) -> None:
    """Remove the copies of all fits of a run that has ended for good."""
    notes = list(_notes(ledger))
    for fit in sorted({int(note["fit"]) for note in notes}):
        settle_fit(read_history(notes, fit), fit)


def settle_fit(history: FileHistory, fit: int) -> None:
    """Remove all copies of one fit.

    Args:
        history: history of the fit's files.
        fit: fit index.
    """
    for path in history.paths:
        if not is_remote(path):
            copies = Copies(path, fit)
            rewritten = history.is_rewritten(path)
            copies.carry_out(_settling(copies, rewritten=rewritten, of_later_fit=path in history.of_later_fits))
            for after in history.removals(path):
                copies.drop_held(after)


def absolute(path: str) -> str:
    """Make a path independent of the working directory."""
    path = path.removeprefix("file://")
    return path if is_remote(path) else os.path.abspath(path)


def is_remote(path: str) -> bool:
    """Whether a path is a URL of storage other than a local file system."""
    return "://" in path


def removes_by_path(checkpoint_io: Any) -> bool:
    """Whether one of Lightning's plugins removes a checkpoint by deleting its path and nothing else."""
    owner: str = type(checkpoint_io).remove_checkpoint.__module__
    return owner.startswith(("lightning.", "lightning_fabric.")) and owner.endswith("plugins.io.torch_io")


def _settling(copies: Copies, *, rewritten: bool, of_later_fit: bool) -> list[Move]:
    return moves_to_settle(copies.found(), rewritten=rewritten, of_later_fit=of_later_fit)


def _notes(ledger: Path) -> Iterable[Mapping[str, Any]]:
    return (event.fields for event in read_ledger(ledger, only="checkpoint"))


def _exists(path: str) -> bool:
    return not is_remote(path) and os.path.exists(path)


def _names(paths: list[str]) -> str:
    shown = ", ".join(paths[:_NAMES_SHOWN])
    return shown if len(paths) <= _NAMES_SHOWN else f"{shown} and {len(paths) - _NAMES_SHOWN} more"


def newest_checkpoint(trainer: Any) -> str | None:
    """The newest checkpoint file that this trainer's callbacks have written, in this process or an earlier one."""
    folders = {Path(folder) for callback in trainer.checkpoint_callbacks if (folder := _folder(trainer, callback))}
    files = [path for folder in folders if folder.is_dir() for path in folder.glob("*.ckpt") if is_whole(path)]
    return str(max(files, key=lambda path: path.stat().st_mtime)) if files else None


def step_of(path: str) -> int | None:
    """The optimizer step of a checkpoint file; None if it is unknown without loading the file.

    Args:
        path: path of the file, or a keyword that Lightning resolves later.
    """
    try:
        loaded = torch.load(path, map_location="meta", mmap=True, weights_only=True)
        return int(loaded["global_step"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
        return None


def _folder(trainer: Any, callback: Any) -> str | None:
    if folder := getattr(callback, "dirpath", None):
        return str(folder)
    log_dir = trainer.logger.log_dir if trainer.logger is not None else trainer.default_root_dir
    return str(Path(log_dir) / "checkpoints") if log_dir else None
