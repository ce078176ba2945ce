"""`StochasticWeightAveraging`, whose state refers to a scheduler of the trainer and holds a whole second model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_ckptless.internals.lightning.distribution import is_a

AVERAGE_STATE = "average_model_state"
"""Key of its `state_dict` that holds the averaged model: its tensors are mirrored with those of the model."""


def averages_weights(callback: Any) -> bool:
    """Whether a callback is one."""
    return is_a(callback, "callbacks", "StochasticWeightAveraging")


def steps_with_old_gradients(callbacks: Iterable[Any], trainer: Any) -> bool:
    """Whether the next optimizer step takes the gradients that this step has left.

    The epoch that is run for the statistics of batch norm goes backward in no batch, and steps in its last.
    """
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch) and any(
        averages_weights(callback)
        and callback._model_contains_batch_norm
        and callback._max_epochs != -1
        and trainer.current_epoch == callback.swa_end
        for callback in callbacks
    )


def join_scheduler(callbacks: Iterable[Any], trainer: Any) -> None:
    """Have it hold the scheduler that the trainer steps, which may have been made in this process."""
    for callback in callbacks:
        if averages_weights(callback):
            configs = trainer.lr_scheduler_configs
            callback._swa_scheduler = configs[0].scheduler if callback._initialized else None
