"""Variants for different versions of Lightning, with the versions in their names.

The rest of this sub-package uses the names without a version. A variant is selected by feature, not by version number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_ckptless.internals.lightning.distribution import distribution_of, module


def validates_by_clock(trainer: Any) -> bool:
    """Return whether the validation interval is a time, which Lightning supports since 2.6."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def shares_sigterm(epoch_loop: Any) -> bool:
    """Return whether ranks exchange a SIGTERM flag in every step, as in Lightning since 2.6."""
    return hasattr(epoch_loop, "_broadcast_sigterm_tensor")


@contextmanager
def without_beginning(trainer: Any) -> Iterator[None]:
    """Make `fit` skip what belongs to the beginning of a run: the sanity check and logging of hyper-parameters."""
    quietly = _no_hparams_since_2_6 if hasattr(trainer, "enable_autolog_hparams") else _no_hparams_until_2_5
    sanity_steps, trainer.num_sanity_val_steps = trainer.num_sanity_val_steps, 0
    try:
        with quietly(trainer):
            yield
    finally:
        trainer.num_sanity_val_steps = sanity_steps


@contextmanager
def _no_hparams_since_2_6(trainer: Any) -> Iterator[None]:
    logs, trainer.enable_autolog_hparams = trainer.enable_autolog_hparams, False
    try:
        yield
    finally:
        trainer.enable_autolog_hparams = logs


@contextmanager
def _no_hparams_until_2_5(trainer: Any) -> Iterator[None]:
    owner: Any = module(distribution_of(trainer), "trainer.trainer")
    log, owner._log_hyperparams = owner._log_hyperparams, lambda _: None
    try:
        yield
    finally:
        owner._log_hyperparams = log
