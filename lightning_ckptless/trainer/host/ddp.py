"""What Lightning's data-parallel strategy keeps to itself."""

from __future__ import annotations

from typing import Any


def model_averaging_period(strategy: Any) -> int | None:
    """Steps between two averagings of the ranks' parameters; None where gradients are averaged, as usual."""
    period: int | None = strategy._model_averaging_period
    return period
