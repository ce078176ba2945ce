"""Learning rate searches by `LearningRateFinder`, which trains inside `fit` and discards the result.

A search is plain data-parallel training: no versions are captured in it, and a fault before the first version repeats
it. Its result is part of every version, so a process that restores a version does not search.
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


class LearningRateSearches:
    """The learning rate searches of one fit.

    Args:
        trainer: trainer whose model is set up.
        loops: loops of the trainer.
        data_hooks: dataloader hooks, which a search calls as well.
        will_restore: returns whether this process is about to restore a version.
        note: file that stores the path of the checkpoint file of a search in progress.
    """

    def __init__(
        self,
        trainer: Any,
        loops: FitLoops,
        data_hooks: DataHooks,
        will_restore: Callable[[], bool],
        note: Path,
    ) -> None:
        self._trainer = trainer
        self._loops = loops
        self._data_hooks = data_hooks
        self._will_restore = will_restore
        self._note = note
        self._callbacks = rate_finders(trainer)
        for callback in self._callbacks:
            override = Override(callback, "lr_find", lambda *_: None)
            override.function = partial(self._search, override.original)

    def give_back(self) -> None:
        """Restore the callbacks' original methods."""
        for callback in self._callbacks:
            remove_overrides(callback, "lr_find")

    def _search(self, search: Callable[[Any, Any], None], trainer: Any, module: Any) -> None:
        if self._will_restore():
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
        """Remove the checkpoint file that a killed search left behind, and record the path of the next one."""
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
    """Undo what an interrupted search changed: after another rank's fault, the trainer resumes from a version."""
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
