"""Searches for a learning rate by `LearningRateFinder`, which trains inside `fit` and throws away what it trained.

A search is plain data-parallel training of its own: no version is taken in it, and a fault before the first version
starts it again. What it has found is part of every version, so a process that takes up a version does not search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_ckptless.internals.lightning.distribution import is_a
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.override import Override, remove_overrides

if TYPE_CHECKING:
    from lightning_ckptless.trainer.data.hooks import DataHooks


class RateSearches:
    """Those of the callbacks of one fit.

    Args:
        trainer: whose model is set up.
        loops: of the trainer.
        data_hooks: which a search calls as well.
        takes_up_a_version: whether this process is about to continue where others are.
    """

    def __init__(
        self, trainer: Any, loops: FitLoops, data_hooks: DataHooks, takes_up_a_version: Callable[[], bool]
    ) -> None:
        self._trainer = trainer
        self._loops = loops
        self._data_hooks = data_hooks
        self._takes_up_a_version = takes_up_a_version
        self._callbacks = [c for c in trainer.callbacks if is_a(c, "callbacks", "LearningRateFinder")]
        for callback in self._callbacks:
            override = Override(callback, "lr_find", lambda *_: None)
            override.function = partial(self._search, override.original)

    def give_back(self) -> None:
        """Give the callbacks their own method back."""
        for callback in self._callbacks:
            remove_overrides(callback, "lr_find")

    def _search(self, search: Callable[[Any, Any], None], trainer: Any, module: Any) -> None:
        if self._takes_up_a_version():
            return
        self._data_hooks.record_from_now_on()
        with _put_back_on_error(trainer), self._loops.without_overrides(), trainer.strategy.without_engine():
            search(trainer, module)


@contextmanager
def _put_back_on_error(trainer: Any) -> Iterator[None]:
    """Undo what an interrupted search leaves: the trainer continues from a version after the fault of another rank."""
    strategy, epoch = trainer.strategy, trainer.fit_loop.epoch_loop
    before = trainer.callbacks, trainer.loggers, strategy.optimizers, strategy.lr_scheduler_configs
    limits = epoch.max_steps, trainer.limit_val_batches
    try:
        yield
    except Exception:
        trainer.callbacks, trainer.loggers, strategy.optimizers, strategy.lr_scheduler_configs = before
        epoch.max_steps, trainer.limit_val_batches = limits
        trainer.should_stop = False
        raise
