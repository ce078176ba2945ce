"""Hooks around the stage of a call of `fit`, `validate`, `test` or `predict`, in which its loop runs.

Lightning sets everything up, runs the stage, and tears everything down. When the stage ends, the results of the call
are complete, and the model, the optimizers and the dataloaders are still set up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_ckptless.internals.lightning.distribution import distribution_of, is_a, module
from lightning_ckptless.internals.lightning.override import Override, remove_overrides

_EVALUATIONS = ("validate_loop", "test_loop", "predict_loop")
Stage = Callable[[], Any]


@contextmanager
def around_stage(trainer: Any, around: Callable[[Stage], Any]) -> Iterator[None]:
    """Context in which a function wraps the stage of a call.

    Args:
        trainer: trainer that is about to be called.
        around: called with the original function that runs the stage; its return value is the result of the call.
    """
    override = Override(trainer, "_run_stage", lambda: around(override.original))
    try:
        yield
    finally:
        remove_overrides(trainer, "_run_stage")


@contextmanager
def without_checkpoint(trainer: Any) -> Iterator[None]:
    """Context in which a call does not load the checkpoint file that it names, which may no longer exist."""

    def run(model: Any, *_: Any, **__: Any) -> Any:
        return override.original(model)

    override = Override(trainer, "_run", run)
    try:
        yield
    finally:
        remove_overrides(trainer, "_run")


@contextmanager
def without_synchronization(trainer: Any) -> Iterator[None]:
    """Context in which the setup of a call other than `fit` does not broadcast the weights of rank 0."""
    owner: Any = module(distribution_of(trainer), "strategies.ddp")
    synchronize, owner._sync_module_states = owner._sync_module_states, lambda _: None
    try:
        yield
    finally:
        owner._sync_module_states = synchronize


def set_up_data_of_stage(trainer: Any) -> None:
    """Request the dataloaders of the current call from the script."""
    trainer._active_loop.setup_data()


def loader_of_stage(trainer: Any) -> Any:
    """Return the dataloaders of the current call; None if it has none."""
    return trainer._active_loop._combined_loader


def evaluation_counters(trainer: Any) -> dict[str, Any]:
    """Return the counters of the loops other than the fit loop, and the checkpoint file that was loaded last."""
    loops = {name: copy.deepcopy(getattr(trainer, name).state_dict()) for name in _EVALUATIONS}
    return {"loops": loops, "ckpt_path": trainer._checkpoint_connector._ckpt_path}


def set_evaluation_counters(trainer: Any, saved: dict[str, Any]) -> None:
    """Restore the result of `evaluation_counters`, without Lightning's own restart logic."""
    for name, state in saved["loops"].items():
        loop = getattr(trainer, name)
        loop.load_state_dict(copy.deepcopy(state))
        loop._restarting = loop._loaded_from_state_dict = False
    trainer._checkpoint_connector._ckpt_path = saved["ckpt_path"]


def is_end_of_search(error: BaseException) -> bool:
    """Return whether an exception ends a call of `Tuner`, which leaves `fit` with this exception."""
    return is_a(error, "utilities.exceptions", "_TunerExitException")


def rate_finders(trainer: Any) -> list[Any]:
    """Return the callbacks that search for a learning rate."""
    return [callback for callback in trainer.callbacks if is_a(callback, "callbacks", "LearningRateFinder")]


def ends_call(finder: Any) -> bool:
    """Return whether the call of `fit` ends with the search of a callback, as in `Tuner.lr_find`."""
    return bool(finder._early_exit)
