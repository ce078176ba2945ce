"""Private parts of Lightning's data-parallel strategy."""

from __future__ import annotations

from typing import Any


def model_averaging_period(strategy: Any) -> int | None:
    """Return the steps between two averagings of the ranks' parameters; None if gradients are averaged, as usual."""
    period: int | None = getattr(strategy, "_model_averaging_period", None)
    return period


def wrap_late(strategy: Any) -> None:
    """Wrap the model in DDP after everything else is set up, without the initial broadcast."""
    given = strategy._ddp_kwargs
    strategy._ddp_kwargs = {**given, "init_sync": False}
    try:
        strategy.configure_ddp()
    finally:
        strategy._ddp_kwargs = given


def start_method_of(strategy: Any) -> str:
    """How a strategy starts its workers: by a name of Lightning's, `popen` where it knows of no other."""
    return str(getattr(strategy, "_start_method", "popen"))
