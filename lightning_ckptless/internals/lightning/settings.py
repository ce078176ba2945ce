"""Settings that a hook may change on the trainer, its loops and plugins, e.g. `accumulate_grad_batches`, `max_epochs`.

Apart from the code that captures them, because it uses private names of Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_OF_EVERY_LOOP = ("_restarting", "_loaded_from_state_dict", "_resuming_from_checkpoint", "_restart_stage")
_KEPT_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "trainer": ("should_stop", "_train_start_time", "_last_val_time"),
    "trainer.fit_loop": (
        *_OF_EVERY_LOOP, "_last_train_dl_reload_epoch", "_combined_loader_states_to_load", "max_batches",
    ),
    "trainer.fit_loop.epoch_loop": (*_OF_EVERY_LOOP, "_batches_that_stepped", "_skip_next_val"),
    "trainer.fit_loop.epoch_loop.val_loop": (
        *_OF_EVERY_LOOP, "_has_run", "_last_val_dl_reload_epoch", "_logged_outputs", "_seen_batches_per_dataloader",
    ),
    "trainer.fit_loop.epoch_loop.automatic_optimization": (*_OF_EVERY_LOOP, "optim_progress"),
    "trainer.fit_loop.epoch_loop.manual_optimization": (*_OF_EVERY_LOOP, "_output"),
}  # fmt: skip
"""By object: attributes that are not settings: counters, clocks and transient state, saved elsewhere in a version."""


def settings_of(trainer: Any) -> Iterator[tuple[str, Any]]:
    """Yield the objects that have settings, by the names that users know."""
    epoch = trainer.fit_loop.epoch_loop
    yield "trainer", trainer
    yield "trainer.fit_loop", trainer.fit_loop
    yield "trainer.fit_loop.epoch_loop", epoch
    for name in ("val_loop", "automatic_optimization", "manual_optimization"):
        yield f"trainer.fit_loop.epoch_loop.{name}", getattr(epoch, name)
    yield "trainer.strategy", trainer.strategy
    yield "trainer.precision_plugin", trainer.precision_plugin


def kept_elsewhere(trainer: Any) -> dict[str, tuple[str, ...]]:
    """Return the names of attributes that are not settings, by object.

    For the strategy and the plugin, only attributes added by the user are settings; their own belong to the process.
    """
    of_process = {
        "trainer.strategy": tuple(vars(trainer.strategy)),
        "trainer.precision_plugin": ("scaler",),
    }
    return _KEPT_ELSEWHERE | of_process


def optimizer_wrappers(trainer: Any) -> Iterator[tuple[str, Any]]:
    """Yield the results of `self.optimizers()`."""
    for index, wrapper in enumerate(trainer.strategy._lightning_optimizers):
        yield f"optimizers()[{index}]", wrapper
