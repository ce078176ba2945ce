"""Trainers and strategies can be pickled and copied at any time, and a copy does not affect the original."""

from __future__ import annotations

import copy
import copyreg
import importlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ckptless._registration.names import classes_for
from lightning_ckptless.internals.lightning import log_files as host_loggers
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.sigterm import SigtermFlag
from lightning_ckptless.lightning_pytorch import CkptlessStrategy
from lightning_ckptless.trainer.commit.step_boundaries import StepBoundaries
from lightning_ckptless.trainer.data.batch_log import BatchLog
from tests.trainer.tiny import DISTRIBUTIONS, callback, tiny_module, tiny_trainer

Copy = Callable[[Any], Any]
WAYS: dict[str, Copy] = {"pickle": lambda value: pickle.loads(pickle.dumps(value)), "deepcopy": copy.deepcopy}


def _named(distribution: str, name: str) -> Any:
    """Make a module class that pickle finds by its name in this file."""
    made = type(tiny_module(distribution))
    made.__module__, made.__qualname__ = __name__, name
    return made


First, Second = _named(DISTRIBUTIONS[0], "First"), _named(DISTRIBUTIONS[1], "Second")
MODULES = dict(zip(DISTRIBUTIONS, (First, Second), strict=True))


class Batches:
    """A training loader that is not a `DataLoader`."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.ones(2, 2),)] * 3)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", ["CkptlessStrategy", "CkptlessModelParallelStrategy"])
@pytest.mark.parametrize("way", WAYS)
def test_an_unused_trainer_can_be_copied(way: str, name: str, distribution: str, tmp_path: Path) -> None:
    strategy = getattr(classes_for(distribution), name)(copies=0)
    trainer = importlib.import_module(distribution).Trainer(
        accelerator="cpu", devices=2, strategy=strategy, logger=False, default_root_dir=tmp_path
    )
    copied = WAYS[way](trainer)
    assert type(copied.strategy) is type(strategy)
    assert copied.strategy.options == strategy.options
    assert copied.strategy.launcher.guard.strategy is copied.strategy
    assert copied.strategy.world is strategy.world, "process groups belong to the process"


class Derived(CkptlessStrategy):
    """A strategy defined in a user's script."""


@pytest.mark.parametrize("way", WAYS)
def test_a_derived_strategy_can_be_copied(way: str) -> None:
    copied = WAYS[way](Derived(copies=0))
    assert type(copied) is Derived and copied.options.copies == 0


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_can_be_copied_in_the_middle_of_training(
    way: str, distribution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All methods that the engine patches are patched: a copy has Lightning's original methods."""
    calls: list[str] = []
    copies: list[Any] = []

    def look(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            assert type(trainer.fit_loop._data_fetcher) is not type(WAYS[way](trainer.fit_loop)._data_fetcher)
            copies.append(WAYS[way](trainer))

    logger = importlib.import_module(f"{distribution}.loggers").CSVLogger(str(tmp_path))
    hooks = callback(distribution, on_train_batch_end=look)
    # The local functions of this test cannot be pickled: replace their callback in the copy.
    monkeypatch.setitem(copyreg.dispatch_table, type(hooks), lambda _: (Batches, ()))
    trainer = tiny_trainer(tmp_path, distribution, logger=logger, callbacks=[hooks])
    host_loggers.watch_logs(trainer.loggers)
    loops, log = FitLoops(trainer), BatchLog(FitLoops(trainer), lambda: 4)
    StepBoundaries(
        loops, lambda version: calls.append(str(version)), every_n_steps=lambda: 1, since=None, before_batch=log.watch
    )
    SigtermFlag(trainer)
    loops.around_setup_of_data(lambda: calls.append("setup"), lambda: None)
    loops.run_by(lambda run: run())
    trainer.fit(MODULES[distribution](), Batches())
    assert trainer.global_step == 3

    (copied,), before = copies, len(calls)
    assert copied.global_step == 2
    copied.callbacks.clear()
    copied.fit_loop.max_epochs = 2
    copied.fit(MODULES[distribution](), Batches())
    assert copied.global_step > 3
    assert len(calls) == before, "the copy called a wrapper of the original"
