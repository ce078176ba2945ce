"""What belongs to the program can be pickled and copied at any time, and a copy does not act on the original."""

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

from lightning_ckptless.assembly import strategy_for
from lightning_ckptless.trainer.host import loggers as host_loggers
from lightning_ckptless.trainer.host.loops import FitLoops
from lightning_ckptless.trainer.host.sigterm import SigtermFlag
from lightning_ckptless.trainer.replay import BatchLog
from lightning_ckptless.trainer.step import StepBoundaries
from tests.trainer.tiny import FLAVOURS, callback, tiny_module, tiny_trainer

Copy = Callable[[Any], Any]
WAYS: dict[str, Copy] = {"pickle": lambda value: pickle.loads(pickle.dumps(value)), "deepcopy": copy.deepcopy}


def _named(flavour: str, name: str) -> Any:
    """A class of a module, by a name under which pickle finds it here."""
    made = type(tiny_module(flavour))
    made.__module__, made.__qualname__ = __name__, name
    return made


First, Second = _named(FLAVOURS[0], "First"), _named(FLAVOURS[1], "Second")
MODULES = dict(zip(FLAVOURS, (First, Second), strict=True))


class Batches:
    """A training loader that is no DataLoader."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.ones(2, 2),)] * 3)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", ["ckptless", "ckptless_model_parallel"])
@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_that_has_not_trained(way: str, name: str, flavour: str, tmp_path: Path) -> None:
    strategy = strategy_for(flavour, name)(copies=0)
    trainer = importlib.import_module(flavour).Trainer(
        accelerator="cpu", devices=2, strategy=strategy, logger=False, default_root_dir=tmp_path
    )
    copied = WAYS[way](trainer)
    assert type(copied.strategy) is type(strategy)
    assert copied.strategy.options == strategy.options
    assert copied.strategy.launcher.guard.strategy is copied.strategy
    assert copied.strategy.world is not strategy.world


class Derived(strategy_for(FLAVOURS[0])):  # type: ignore[misc]
    """A strategy of a program."""


@pytest.mark.parametrize("way", WAYS)
def test_a_strategy_that_a_program_has_derived_from_ours(way: str) -> None:
    copied = WAYS[way](Derived(copies=0))
    assert type(copied) is Derived and copied.options.copies == 0


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("way", WAYS)
def test_in_the_middle_of_training(way: str, flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every method replaced that the engine replaces: a copy has its own, of Lightning's."""
    calls: list[str] = []
    copies: list[Any] = []

    def look(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            assert type(trainer.fit_loop._data_fetcher) is not type(WAYS[way](trainer.fit_loop)._data_fetcher)
            copies.append(WAYS[way](trainer))

    logger = importlib.import_module(f"{flavour}.loggers").CSVLogger(str(tmp_path))
    hooks = callback(flavour, on_train_batch_end=look)
    # Functions of this test cannot be pickled: a copy gets something else in the place of their callback.
    monkeypatch.setitem(copyreg.dispatch_table, type(hooks), lambda _: (Batches, ()))
    trainer = tiny_trainer(tmp_path, flavour, logger=logger, callbacks=[hooks])
    host_loggers.watch_logs(trainer.loggers)
    loops, log = FitLoops(trainer), BatchLog(FitLoops(trainer), lambda: 4)
    StepBoundaries(
        loops, lambda version: calls.append(str(version)), every_n_steps=lambda: 1, since=None, before_batch=log.watch
    )
    SigtermFlag(trainer)
    loops.before_setup_of_data(lambda: calls.append("setup"))
    loops.run_by(lambda run: run())
    trainer.fit(MODULES[flavour](), Batches())
    assert trainer.global_step == 3

    (copied,), before = copies, len(calls)
    assert copied.global_step == 2
    copied.callbacks.clear()
    copied.fit_loop.max_epochs = 2
    copied.fit(MODULES[flavour](), Batches())
    assert copied.global_step > 3
    assert len(calls) == before, "the copy called what was put around the original"
