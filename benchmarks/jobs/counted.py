"""Report the samples that a rank trains on with every step; at the end, store the weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.harness.wire import Wire
from benchmarks.jobs.training import Trained

WEIGHTS = "end.pt"
SLOW = "slow"
"""While this file exists, each step is followed by a pause, so that nodes that join find the job running."""
PAUSE_S = 0.1


class Notebook:
    """The samples of the current step; in a separate class, because a version would contain plain values."""

    def __init__(self) -> None:
        self.step: tuple[int, int] | None = None
        self.samples: list[int] = []
        self.began_at = 0

    def attempt_of(self, trainer: pl.Trainer) -> int:
        """Return the number of the start or reconfiguration; without our strategy, the time of the start in ns."""
        engine: Any = getattr(trainer.strategy, "engine", None)
        return self.began_at if engine is None else int(engine.generation)

    def saw(self, attempt: int, step: int, samples: list[int]) -> None:
        """Add a micro-batch of a step; those of an interrupted step are dropped."""
        if self.step != (attempt, step):
            self.step, self.samples = (attempt, step), []
        self.samples += samples


class Counted(Trained):
    """The model of all jobs, which notes its samples: the second part of a batch are their indices."""

    def __init__(self, size: str, *, sharded: bool) -> None:
        super().__init__(size, sharded=sharded)
        self.notebook = Notebook()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        for_nothing = getattr(self.trainer.strategy, "runs_for_nothing", False)
        attempt = self.notebook.attempt_of(self.trainer)
        self.notebook.saw(attempt, self.global_step, [] if for_nothing else batch[1].tolist())
        return super().training_step(batch, batch_idx)


class SampleReporter(pl.Callback):
    """Report every finished step of a `Counted` model with its samples.

    Args:
        wire: connection to the benchmark.
        root: folder for the weights.
    """

    def __init__(self, wire: Wire, root: Path) -> None:
        self.wire, self.root = wire, root

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Counted)
        if not hasattr(trainer.strategy, "engine"):
            pl_module.notebook.began_at = int(trainer.strategy.broadcast(time.time_ns()))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        assert isinstance(pl_module, Counted)
        self.wire.send(
            "counted", attempt=pl_module.notebook.attempt_of(trainer), epoch=trainer.current_epoch,
            step=trainer.global_step - 1, rank=trainer.global_rank, world=trainer.world_size,
            samples=tuple(pl_module.notebook.samples),
        )  # fmt: skip
        if (self.root / SLOW).exists():
            time.sleep(PAUSE_S)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        whole = {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in pl_module.named_parameters()}
        if trainer.global_rank == 0:
            torch.save(whole, self.root / WEIGHTS)
