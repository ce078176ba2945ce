"""How `Trainer.fit` calls its launcher, and which exceptions end it on purpose."""

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
    """Return whether a function passed to the launcher implements `Trainer.fit`."""
    return getattr(function, "__name__", "") == FIT


def fit_parameters(distribution: str) -> list[str]:
    """Return the names of the positional arguments that `fit` passes to the launcher."""
    return list(inspect.signature(getattr(module(distribution).Trainer, FIT)).parameters)[1:]


def is_stop(error: BaseException) -> bool:
    """Return whether an exception is a request to stop and not a fault."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return True
    return is_a(error, "utilities.exceptions", "SIGTERMException") or ends_on_purpose(error)


def ends_on_purpose(error: BaseException) -> bool:
    """Return whether an exception ends only this call of `fit`: a search of `Tuner`, or a pruned trial."""
    optuna: Any = sys.modules.get("optuna")
    return is_end_of_search(error) or (optuna is not None and isinstance(error, optuna.TrialPruned))
