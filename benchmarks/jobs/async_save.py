"""Torch's own means for the same purpose: `torch.distributed.checkpoint.async_save`, called from a callback."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save

FOLDER, NOTES = "saves", "saves.jsonl"


class AsyncSave(pl.Callback):
    """Save model and optimizer every few steps, one save at a time, through a separate process group.

    Args:
        every_n_steps: steps between two saves.
        folder: folder for the checkpoints; rank 0 keeps the last two and records the duration of each save.
    """

    def __init__(self, every_n_steps: int, folder: Path) -> None:
        self.every_n_steps = every_n_steps
        self.folder = folder
        self.group: Any = None
        self.pending: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        self.group = dist.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every_n_steps:
            return
        began = time.perf_counter()
        if self.pending is not None:
            self.pending.result()
        model, optimizers = get_state_dict(pl_module, trainer.optimizers)
        target = self.folder / f"step-{trainer.global_step}"
        self.pending = async_save(
            {"model": model, "optimizers": optimizers}, checkpoint_id=target, process_group=self.group
        )
        blocked_s = time.perf_counter() - began
        if trainer.global_rank == 0:
            self.pending.add_done_callback(lambda _: self.note(target, began, blocked_s))
            shutil.rmtree(self.folder / f"step-{trainer.global_step - 2 * self.every_n_steps}", ignore_errors=True)

    def note(self, target: Path, began: float, blocked_s: float) -> None:
        size_bytes = sum(path.stat().st_size for path in target.glob("*"))
        total_s = time.perf_counter() - began
        facts = {"blocked_s": blocked_s, "total_s": total_s, "bytes": size_bytes}
        with (self.folder / NOTES).open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        if self.pending is not None:
            self.pending.result()


def saves_of(folder: Path) -> list[dict[str, float]]:
    """Return the recorded durations and sizes of the saves of the job that ran in a folder."""
    notes = folder / FOLDER / NOTES
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
