"""What a call of a trainer in a worker has come to, brought back into the trainer of the process that was forked.

After `fit` this is what a program finds that has called it in its own process: weights, the loops' counters, the
states of callbacks, metrics, and where the loggers write. Attributes that only the program's own code knows stay in the
worker.
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
    """The cluster environment of a worker that an elastic agent has started."""
    return fabric_module(distribution, "plugins.environments").TorchElasticEnvironment()


def without_predictions(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with which a call of `predict` returns no predictions: each rank has those of its own samples only.

    Args:
        function: of the trainer, as it is handed to the launcher.
        args: its arguments.

    Raises:
        OptionsError: the call asks for predictions.
    """
    if getattr(function, "__name__", "") != _PREDICT:
        return args
    bound = inspect.signature(function).bind(*args)
    if bound.arguments.get(_PREDICTIONS):
        raise OptionsError(
            "return_predictions=True: each worker has the predictions of its own samples only, and they stay there. "
            "Add a callback that writes them (lightning's BasePredictionWriter), or predict with a trainer of its own: "
            "Trainer(devices=1, strategy='auto')"
        )
    bound.arguments[_PREDICTIONS] = False
    return bound.args


def capture(trainer: Any) -> dict[str, Any]:
    """The state of a trainer after a call: tensors, plain data, and what callbacks have in their states.

    All ranks call it: a metric may be summed up over them when it is asked for its state.
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
        # What was not trained may have been read from a file.
        found["model"] = trainer.lightning_module.state_dict()
        found["callbacks"] = [(callback.state_key, callback.state_dict()) for callback in trainer.callbacks]
    return found


def restore(trainer: Any, captured: dict[str, Any]) -> None:
    """Give the state of a worker's trainer to the one that it was forked from.

    Args:
        trainer: has the same callbacks and loggers.
        captured: what `capture` returned in the worker.
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
        # As Lightning does it: the model of the worker may have parts that its hooks have made.
        trainer.lightning_module.load_state_dict(captured["model"], strict=False)
        _restore_callbacks(trainer.callbacks, dict(captured["callbacks"]))


def _restore_callbacks(callbacks: list[Any], states: dict[str, Any]) -> None:
    for callback in callbacks:
        if not (state := states.get(callback.state_key)):
            continue
        if is_a(callback, "callbacks", "ModelCheckpoint"):
            # It takes scores over only where it writes to the same folder, which it has chosen in the worker.
            callback.dirpath = state.get("dirpath", callback.dirpath)
        callback.load_state_dict(state)


def _loggers(trainer: Any) -> list[Any]:
    return [logger for logger in trainer.loggers if not is_dummy(logger)]
