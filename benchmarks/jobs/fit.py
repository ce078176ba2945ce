"""The training of a job: one Lightning run on random tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness.wire import Wire
from benchmarks.jobs.gpt import random_tokens
from benchmarks.jobs.job import JobOptions
from benchmarks.jobs.training import StepReporter, Trained, Turns

SAMPLES = 4096


def make_strategy(options: JobOptions) -> Any:
    """Return the strategy to pass to the trainer; a run with Lightning's own strategy imports nothing of ours."""
    ranks = options.devices * options.nodes
    sizes: dict[str, Any] = {"data_parallel_size": ranks, "tensor_parallel_size": 1}
    if options.strategy != "ckptless":
        return ModelParallelStrategy(**sizes) if options.sharded else options.strategy
    from lightning_ckptless import CkptlessModelParallelStrategy, CkptlessStrategy  # noqa: PLC0415

    if options.sharded:
        return CkptlessModelParallelStrategy(**sizes, **options.strategy_options)
    return CkptlessStrategy(**options.strategy_options)


def prepare(options: JobOptions) -> Callable[[Wire], None]:
    """Return the function that trains with the given options."""
    return partial(train, options, make_strategy(options))


def make_reporter(options: JobOptions, wire: Wire) -> pl.Callback:
    """Return the callback that reports the training."""
    if options.census:
        from benchmarks.jobs.census import Census  # noqa: PLC0415 - one variant only

        return Census(wire)
    if options.profiled:
        from benchmarks.jobs.profiled import Profiled  # noqa: PLC0415 - one variant only

        return Turns(wire, Profiled)
    return Turns(wire) if options.turns else StepReporter(wire)


def train(options: JobOptions, strategy: Any, wire: Wire) -> None:
    """Train with the given options and the result of `make_strategy`."""
    pl.seed_everything(11, verbose=False)
    callbacks = [make_reporter(options, wire)]
    if options.checkpoint_every:
        folder = os.path.join(options.root, "checkpoints")
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=options.checkpoint_every, save_last=True))
    if options.async_save_every:
        from benchmarks.jobs.async_save import FOLDER, AsyncSave  # noqa: PLC0415 - one variant only

        saves = Path(FOLDER)
        saves.mkdir(exist_ok=True)
        callbacks.append(AsyncSave(options.async_save_every, saves))
    trainer = pl.Trainer(
        accelerator=options.accelerator, devices=options.devices, num_nodes=options.nodes, strategy=strategy,
        max_steps=options.steps, max_epochs=-1, callbacks=callbacks, logger=False,
        enable_checkpointing=bool(options.checkpoint_every), enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=options.root,
    )  # fmt: skip
    data = DataLoader(TensorDataset(random_tokens(SAMPLES)), batch_size=options.batch, shuffle=True)
    wire.send("fit")
    model = Trained(options.size, sharded=options.sharded, pace_s=options.pace_s)
    trainer.fit(model, data, ckpt_path="last" if options.checkpoint_every else None)
    wire.send("done")
