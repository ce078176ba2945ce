"""Checkpoint files that a run can continue from: which is the newest, and of which step it is."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from lightning_ckptless.trainer.reporting.checkpoint_copies import is_whole


def newest_checkpoint(trainer: Any) -> str | None:
    """The newest checkpoint file that this trainer's callbacks have written, in this process or before it."""
    folders = {Path(folder) for callback in trainer.checkpoint_callbacks if (folder := _folder(trainer, callback))}
    files = [path for folder in folders if folder.is_dir() for path in folder.glob("*.ckpt") if is_whole(path)]
    return str(max(files, key=lambda path: path.stat().st_mtime)) if files else None


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
