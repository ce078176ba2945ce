"""Checkpoint files across a relaunch.

A fault rolls the run back to a step; checkpoint files written after that step belong to a future that did not happen.
They are removed, so that the step which is run again finds the folder as it was: otherwise `ModelCheckpoint` would
see its own file and write a second one beside it.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lightning_ckptless.protocol.versions import Version

Noted = dict[str, Any]
WRITTEN_LAST = (".metadata", "meta.pt")
"""In the folder of a sharded model's checkpoint: of torch.distributed.checkpoint, and of Lightning."""


def note_of_save(path: str, after: Version | None, existed: bool) -> Noted:
    """What the ledger is told before a checkpoint file is written."""
    step, tail = (after.optimizer_step, after.tail_done) if after else (-1, False)
    return {"path": path, "after_step": step, "after_tail": tail, "existed": existed}


def files_of_the_future(notes: Iterable[Noted], restored: Version) -> list[Path]:
    """Files whose writing began after a version was taken, and that were not there before.

    Args:
        notes: what `note_of_save` gave, in the order of writing.
        restored: the version that the run goes on from.
    """
    files: dict[Path, bool] = {}
    for note in notes:
        path = Path(note["path"])
        if Version(note["after_step"], note["after_tail"]) < restored:
            files[path] = False
        elif not note["existed"]:
            files.setdefault(path, True)
    return [path for path, ahead in files.items() if ahead and path.exists()]


def newest_checkpoint(trainer: Any) -> str | None:
    """The newest checkpoint file that this trainer's callbacks have written, in this process or before it."""
    folders = {Path(folder) for callback in trainer.checkpoint_callbacks if (folder := _folder(trainer, callback))}
    files = [path for folder in folders if folder.is_dir() for path in folder.glob("*.ckpt") if is_whole(path)]
    return str(max(files, key=lambda path: path.stat().st_mtime)) if files else None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has been written to its end: a file, or a folder of a sharded model with what comes last."""
    return path.is_file() or all((path / last).is_file() for last in WRITTEN_LAST)


def remove(path: Path) -> None:
    """Remove a checkpoint, be it a file or the folder of a sharded model."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def step_of(path: str) -> int | None:
    """The optimizer step of a checkpoint file; None where it cannot be known without loading it.

    Args:
        path: of the file, or a word that Lightning makes a path of later.
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
