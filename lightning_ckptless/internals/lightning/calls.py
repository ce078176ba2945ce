"""A call of `fit`, `validate`, `test` or `predict`, seen from around the stage in which its loop runs.

Lightning sets everything up, runs the stage, and tears everything down again. What a call leaves in the trainer is
complete when the stage ends, while the model, the optimizers and the dataloaders are still in place.
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
    """Context in which the stage of a call is run by a function.

    Args:
        trainer: that is about to be called.
        around: is given what would have run the stage; what it returns is the result of the call.
    """
    override = Override(trainer, "_run_stage", lambda: around(override.original))
    try:
        yield
    finally:
        remove_overrides(trainer, "_run_stage")


@contextmanager
def without_checkpoint(trainer: Any) -> Iterator[None]:
    """Context in which a call loads no checkpoint file, whichever it names: the file may be gone by now."""

    def run(model: Any, *_: Any, **__: Any) -> Any:
        return override.original(model)

    override = Override(trainer, "_run", run)
    try:
        yield
    finally:
        remove_overrides(trainer, "_run")


@contextmanager
def without_synchronization(trainer: Any) -> Iterator[None]:
    """Context in which a call that does not train is set up without giving the other ranks the weights of rank 0."""
    owner: Any = module(distribution_of(trainer), "strategies.ddp")
    synchronize, owner._sync_module_states = owner._sync_module_states, lambda _: None
    try:
        yield
    finally:
        owner._sync_module_states = synchronize


def set_up_data_of_stage(trainer: Any) -> None:
    """Ask the program for the dataloaders of the call that is under way."""
    trainer._active_loop.setup_data()


def loader_of_stage(trainer: Any) -> Any:
    """The dataloaders of the call that is under way; None where it has none."""
    return trainer._active_loop._combined_loader


def evaluation_counters(trainer: Any) -> dict[str, Any]:
    """The counters of the loops outside of `fit`, and the checkpoint file that was loaded last."""
    loops = {name: copy.deepcopy(getattr(trainer, name).state_dict()) for name in _EVALUATIONS}
    return {"loops": loops, "ckpt_path": trainer._checkpoint_connector._ckpt_path}


def set_evaluation_counters(trainer: Any, saved: dict[str, Any]) -> None:
    """Put back what `evaluation_counters` returned, without Lightning's own notion of a restart."""
    for name, state in saved["loops"].items():
        loop = getattr(trainer, name)
        loop.load_state_dict(copy.deepcopy(state))
        loop._restarting = loop._loaded_from_state_dict = False
    trainer._checkpoint_connector._ckpt_path = saved["ckpt_path"]


def is_end_of_search(error: BaseException) -> bool:
    """Whether an exception ends a call of `Tuner`, which enters `fit` and leaves it by this exception."""
    return is_a(error, "utilities.exceptions", "_TunerExitException")


def rate_finders(trainer: Any) -> list[Any]:
    """The callbacks that search for a learning rate."""
    return [callback for callback in trainer.callbacks if is_a(callback, "callbacks", "LearningRateFinder")]


def ends_call(finder: Any) -> bool:
    """Whether the call of `fit` ends with the search of a callback, as `Tuner.lr_find` has it."""
    return bool(finder._early_exit)
