"""Transfers the results of a trainer call in a worker back to the trainer of the process that it was forked from.

After `fit` the script finds what a call in its own process would have left: weights, loop counters, callback states,
metrics, and where the loggers write. Attributes that only the script's own code knows stay in the worker.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.lightning.distribution import fabric_module, is_a
from lightning_ckptless.internals.lightning.logger_identity import identity_of, is_dummy, set_identity
from lightning_ckptless.internals.lightning.loops import FitLoops

_METRICS = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
_PREDICT = "_predict_impl"
_PREDICTIONS = "return_predictions"


def elastic_environment(distribution: str) -> Any:
    """Return the cluster environment for a worker of an elastic agent."""
    return fabric_module(distribution, "plugins.environments").TorchElasticEnvironment()


def without_predictions(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Change the arguments of `predict` so that it returns no predictions, as each rank has only those of its samples.

    Args:
        function: function of the trainer that is passed to the launcher.
        args: its arguments.

    Raises:
        OptionsError: the call requests predictions.
    """
    if getattr(function, "__name__", "") != _PREDICT:
        return args
    bound = inspect.signature(function).bind(*args)
    if bound.arguments.get(_PREDICTIONS):
        raise OptionsError(
            "return_predictions=True: each worker has only the predictions of its own samples and cannot return them. "
            "Write them with a callback (BasePredictionWriter), or predict with a separate trainer: "
            "Trainer(devices=1, strategy='auto')"
        )
    bound.arguments[_PREDICTIONS] = False
    return bound.args


def capture(trainer: Any) -> dict[str, Any]:
    """Return the state of a trainer after a call: tensors, plain data, and callback states.

    All ranks must call it, as reading the state of a metric may reduce it over the ranks.
    """
    is_fit = trainer.state.fn == "fit"
    found: dict[str, Any] = {
        "state": trainer.state,
        "metrics": {name: dict(getattr(trainer, name)) for name in _METRICS},
        "loggers": [identity_of(logger) for logger in _loggers(trainer)],
    }
    if is_fit:
        found |= {"counters": FitLoops(trainer).counters(), "should_stop": trainer.should_stop}
    if is_fit or trainer.ckpt_path is not None:
        # Other calls change the model only if they load a checkpoint.
        found["model"] = trainer.lightning_module.state_dict()
        found["callbacks"] = [(callback.state_key, callback.state_dict()) for callback in trainer.callbacks]
    return found


def restore(trainer: Any, captured: dict[str, Any]) -> None:
    """Apply the state of a worker's trainer to the trainer that it was forked from.

    Args:
        trainer: trainer with the same callbacks and loggers.
        captured: result of `capture` in the worker.
    """
    trainer.state = captured["state"]
    for name in _METRICS:
        metrics = getattr(trainer, name)
        metrics.clear()
        metrics.update(captured["metrics"][name])
    for logger, identity in zip(_loggers(trainer), captured["loggers"], strict=True):
        set_identity(logger, identity)
    if "counters" in captured:
        FitLoops(trainer).set_counters(captured["counters"])
        trainer.should_stop = captured["should_stop"]
    if "model" in captured:
        # Not strict, like in Lightning, as hooks may have added parts to the model in the worker.
        trainer.lightning_module.load_state_dict(captured["model"], strict=False)
        _restore_callbacks(trainer.callbacks, dict(captured["callbacks"]))


def _restore_callbacks(callbacks: list[Any], states: dict[str, Any]) -> None:
    for callback in callbacks:
        if not (state := states.get(callback.state_key)):
            continue
        if is_a(callback, "callbacks", "ModelCheckpoint"):
            # It adopts the scores only if its folder is the same, which was chosen in the worker.
            callback.dirpath = state.get("dirpath", callback.dirpath)
        callback.load_state_dict(state)


def _loggers(trainer: Any) -> list[Any]:
    return [logger for logger in trainer.loggers if not is_dummy(logger)]
