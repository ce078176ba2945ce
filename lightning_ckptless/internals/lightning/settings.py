"""What a hook may set on the trainer, its loops and plugins: `accumulate_grad_batches`, `max_epochs` and the like.

It is a file of its own because the names in it are private ones of Lightning's.
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
    "trainer.fit_loop.epoch_loop.automatic_optimization": _OF_EVERY_LOOP,
    "trainer.fit_loop.epoch_loop.manual_optimization": (*_OF_EVERY_LOOP, "_output"),
}  # fmt: skip
"""By object: attributes that are counters, clocks or of the moment, which a version holds in another place."""


def settings_of(trainer: Any) -> Iterator[tuple[str, Any]]:
    """The objects that hold settings, by what a user calls them."""
    epoch = trainer.fit_loop.epoch_loop
    yield "trainer", trainer
    yield "trainer.fit_loop", trainer.fit_loop
    yield "trainer.fit_loop.epoch_loop", epoch
    for name in ("val_loop", "automatic_optimization", "manual_optimization"):
        yield f"trainer.fit_loop.epoch_loop.{name}", getattr(epoch, name)
    yield "trainer.strategy", trainer.strategy
    yield "trainer.precision_plugin", trainer.precision_plugin


def kept_elsewhere(trainer: Any) -> dict[str, tuple[str, ...]]:
    """Names of attributes that are not settings, by object.

    Of the strategy and the plugin only what a user adds is one: what they have of their own is the process's.
    """
    of_process = {
        "trainer.strategy": tuple(vars(trainer.strategy)),
        "trainer.precision_plugin": ("scaler",),
    }
    return _KEPT_ELSEWHERE | of_process


def optimizer_wrappers(trainer: Any) -> Iterator[tuple[str, Any]]:
    """What `self.optimizers()` gives."""
    for index, wrapper in enumerate(trainer.strategy._lightning_optimizers):
        yield f"optimizers()[{index}]", wrapper
