"""Searches for a learning rate by `LearningRateFinder`, which trains inside `fit` and throws away what it trained.

A search is plain data-parallel training of its own: no version is taken in it, and a fault before the first version
starts it again. What it has found is part of every version, so a process that takes up a version does not search.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ckptless.internals.lightning.calls import rate_finders
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
        note: file that names the checkpoint file of a search under way.
    """

    def __init__(
        self,
        trainer: Any,
        loops: FitLoops,
        data_hooks: DataHooks,
        takes_up_a_version: Callable[[], bool],
        note: Path,
    ) -> None:
        self._trainer = trainer
        self._loops = loops
        self._data_hooks = data_hooks
        self._takes_up_a_version = takes_up_a_version
        self._note = note
        self._callbacks = rate_finders(trainer)
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
        with (
            _put_back_on_error(trainer),
            self._no_file_left(),
            self._loops.without_overrides(),
            trainer.strategy.without_engine(),
        ):
            search(trainer, module)

    @contextmanager
    def _no_file_left(self) -> Iterator[None]:
        """Remove the file in which a search that was killed has kept the model, and name that of the next one."""
        trainer, strategy = self._trainer, self._trainer.strategy
        if not trainer.is_global_zero:
            yield
            return
        if self._note.exists():
            Path(self._note.read_text()).unlink(missing_ok=True)

        def save(checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any) -> None:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            self._note.write_text(os.path.abspath(filepath))
            override.original(checkpoint, filepath, *args, **kwargs)

        override = Override(strategy, "save_checkpoint", save)
        try:
            yield
        finally:
            remove_overrides(strategy, "save_checkpoint")
        self._note.unlink(missing_ok=True)


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
