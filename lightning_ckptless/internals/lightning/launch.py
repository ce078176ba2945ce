"""How `Trainer.fit` reaches its launcher, and what ends it on purpose."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from lightning_ckptless.internals.lightning.calls import is_end_of_search
from lightning_ckptless.internals.lightning.distribution import is_a, module

FIT = "_fit_impl"
CKPT_PATH_INDEX = 4


def is_fit(function: Callable[..., Any]) -> bool:
    """Whether a function handed to the launcher is the one behind `Trainer.fit`."""
    return getattr(function, "__name__", "") == FIT


def fit_parameters(distribution: str) -> list[str]:
    """Names of the positional arguments that `fit` hands to the launcher."""
    return list(inspect.signature(getattr(module(distribution).Trainer, FIT)).parameters)[1:]


def launcher_base(distribution: str) -> Any:
    """Base class of a distribution's launchers."""
    return module(distribution, "strategies.launchers.launcher")._Launcher


def is_stop(error: BaseException) -> bool:
    """Whether an exception is a request to stop, not a fault."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return True
    return is_a(error, "utilities.exceptions", "SIGTERMException") or ends_on_purpose(error)


def ends_on_purpose(error: BaseException) -> bool:
    """Whether an exception ends this call of `fit` and not the program: a search of `Tuner`, or a pruned trial."""
    optuna: Any = sys.modules.get("optuna")
    return is_end_of_search(error) or (optuna is not None and isinstance(error, optuna.TrialPruned))
