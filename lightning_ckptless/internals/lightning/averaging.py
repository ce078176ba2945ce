"""`StochasticWeightAveraging`, whose state includes a scheduler of the trainer and a second model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_ckptless.internals.lightning.distribution import is_subclass

AVERAGE_STATE = "average_model_state"
"""`state_dict` key of the averaged model, whose tensors are mirrored like those of the model."""


def averages_weights(callback: Any) -> bool:
    """Return whether a callback is a `StochasticWeightAveraging`."""
    return is_subclass(callback.__class__, "callbacks", "StochasticWeightAveraging")


def steps_with_old_gradients(callbacks: Iterable[Any], trainer: Any) -> bool:
    """Return whether the next optimizer step uses the gradients of the current one.

    The epoch that updates batch norm statistics runs no backward pass, but steps after its last batch.
    """
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch) and any(
        averages_weights(callback)
        and callback._model_contains_batch_norm
        and callback._max_epochs != -1
        and trainer.current_epoch == callback.swa_end
        for callback in callbacks
    )


def join_scheduler(callbacks: Iterable[Any], trainer: Any) -> None:
    """Make the callback refer to the trainer's scheduler, which may have been created in this process."""
    for callback in callbacks:
        if averages_weights(callback):
            configs = trainer.lr_scheduler_configs
            callback._swa_scheduler = configs[0].scheduler if callback._initialized else None
