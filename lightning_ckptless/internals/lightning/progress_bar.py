"""Updates Lightning's progress bars after a recovery, and prints messages without garbling them.

Calls only the hooks of Lightning's own two bar classes, never overrides in a user's subclass.
"""

from __future__ import annotations

import sys
from typing import Any

from lightning_ckptless.console import CONSOLE, PREFIX, Bar, write
from lightning_ckptless.distributions import DISTRIBUTIONS
from lightning_ckptless.internals.lightning.distribution import distribution_of, is_a, module

_RICH = "RichProgressBar"
_TQDM = "TQDMProgressBar"


def bar_kind(trainer: Any) -> Bar:
    """Return the kind of bar that rank 0 draws; the result is the same on all ranks."""
    bar = trainer.progress_bar_callback
    if is_a(bar, "callbacks", _TQDM) and bar.refresh_rate > 0:
        return Bar.LINE
    # Without a terminal, a live display writes nothing.
    return Bar.LIVE if is_a(bar, "callbacks", _RICH) and bar.refresh_rate > 0 else Bar.NONE


def say(trainer: Any, text: str) -> None:
    """Print a message above the bar of this process, or without garbling that of another process.

    Args:
        trainer: trainer in `fit`.
        text: message without the package prefix.
    """
    bar = trainer.progress_bar_callback
    if trainer.is_global_zero and is_a(bar, "callbacks", _TQDM) and _is_drawn(bar):
        bar.train_progress_bar.write(f"{PREFIX}{text}", file=sys.stderr)
    elif trainer.is_global_zero and is_a(bar, "callbacks", _RICH):
        # Its live display captures the output of this process and redraws itself below.
        write(f"{PREFIX}{text}")
    else:
        CONSOLE.say(text)


def _is_drawn(bar: Any) -> bool:
    return bar._train_progress_bar is not None and not bar.train_progress_bar.disable


def show_position(trainer: Any, *, afresh: bool) -> None:
    """Make the bar show the epoch, its length and the finished batches after a restore.

    Args:
        trainer: trainer in `fit`, with counters and training data restored.
        afresh: open the bar again, as this process has not drawn one yet.
    """
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero or bar.is_disabled:
        return
    done: int = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    if is_a(bar, "callbacks", _TQDM):
        _show_in_tqdm(trainer, bar, done, afresh=afresh)
    elif is_a(bar, "callbacks", _RICH):
        _show_in_rich(trainer, bar, done, afresh=afresh)


def _show_in_tqdm(trainer: Any, bar: Any, done: int, *, afresh: bool) -> None:
    if bar._val_progress_bar is not None:
        bar.val_progress_bar.close()
    bar.reset_dataloader_idx_tracker()
    if afresh:
        _close_quietly(bar.train_progress_bar)
        own, model = _lightnings(bar, _TQDM), trainer.lightning_module
        own.on_train_start(bar, trainer, model)
        own.on_train_epoch_start(bar, trainer, model)
        bar.train_progress_bar.initial = done
    bar.train_progress_bar.n = done
    bar.train_progress_bar.refresh()


def _close_quietly(tqdm: Any) -> None:
    """Close a bar that was never shown, without drawing it."""
    tqdm.leave = False
    tqdm.close()


def _show_in_rich(trainer: Any, bar: Any, done: int, *, afresh: bool) -> None:
    bar.reset_dataloader_idx_tracker()
    if afresh:
        if bar.progress is not None:
            bar.progress.stop()
        bar.progress = bar.train_progress_bar_id = None
        own, model = _lightnings(bar, _RICH), trainer.lightning_module
        own.on_train_start(bar, trainer, model)
        own.on_train_epoch_start(bar, trainer, model)
    elif bar.progress is not None and getattr(bar, "val_progress_bar_id", None) is not None:
        bar.progress.update(bar.val_progress_bar_id, visible=False)
    if bar.progress is not None and bar.train_progress_bar_id is not None:
        bar.progress.update(bar.train_progress_bar_id, completed=done)
        bar.refresh()


def _lightnings(bar: Any, name: str) -> Any:
    assert distribution_of(bar) in DISTRIBUTIONS
    return getattr(module(distribution_of(bar), "callbacks"), name)
