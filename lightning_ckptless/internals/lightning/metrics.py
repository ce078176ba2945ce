"""The state of torchmetrics, which is not part of a `state_dict` by default."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum


def dump_metric(metric: Metric) -> dict[str, Any]:
    """Return the state of a metric, as tensors and plain data."""
    return {
        "states": {name: getattr(metric, name) for name in metric._defaults},
        "update_count": metric._update_count,
        "computed": metric._computed if _is_data(metric._computed) else None,
        "forward_cache": metric._forward_cache if _is_data(metric._forward_cache) else None,
    }


def load_metric(metric: Metric, saved: dict[str, Any]) -> None:
    """Restore the state of a metric."""
    for name, value in saved["states"].items():
        setattr(metric, name, _moved(value, metric.device))
    metric._update_count = saved["update_count"]
    metric._computed = _moved(saved["computed"], metric.device)
    metric._forward_cache = _moved(saved["forward_cache"], metric.device)


class _Bare(Metric):
    """A metric without attributes of its own."""

    def update(self, *_: Any, **__: Any) -> None:
        """Accept anything."""

    def compute(self) -> Any:
        """Return nothing."""


@cache
def _of_every_metric() -> frozenset[str]:
    return frozenset(vars(_Bare()))


def attributes_of_state(metric: Metric) -> frozenset[str]:
    """Return the attributes that `dump_metric` covers, or that every metric has. Wrappers of metrics have others."""
    return _of_every_metric() | metric._defaults.keys()


def metrics_of(modules: Iterable[tuple[str, Any]]) -> dict[str, Metric]:
    """Return the metrics among named modules."""
    return {name: module for name, module in modules if isinstance(module, Metric)}


_NAMES: dict[Any, str] = {
    dim_zero_sum: "sum",
    dim_zero_mean: "mean",
    dim_zero_max: "max",
    dim_zero_min: "min",
    dim_zero_cat: "cat",
}


def reductions_of(metric: Metric) -> dict[str, str | None]:
    """Return how each state of a metric is reduced over ranks: a key of `REDUCTIONS`; None for a custom reduction."""
    return {key: _NAMES.get(reduce) for key, reduce in metric._reductions.items()}


def defaults_of(metric: Metric) -> dict[str, Any]:
    """Return the initial values of the states of a metric."""
    return dict(metric._defaults)


def _joined(mine: Any, theirs: Any, *_: int) -> Any:
    if isinstance(mine, list):
        return [*mine, *(theirs if isinstance(theirs, list) else [theirs])]
    return torch.cat([mine, *theirs]) if isinstance(theirs, list) else torch.cat([mine, theirs])


def _mean(mine: Tensor, theirs: Tensor, count: int, other_count: int) -> Tensor:
    return (mine * count + theirs * other_count) / (count + other_count)


REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum": lambda mine, theirs, *_: mine + theirs,
    "mean": _mean,
    "max": lambda mine, theirs, *_: torch.maximum(mine, theirs),
    "min": lambda mine, theirs, *_: torch.minimum(mine, theirs),
    "cat": _joined,
}
"""Functions that merge the states of two ranks, called with both states and their update counts."""


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor | dict | list | tuple)


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return value


def default_names(metric: Any) -> list[str]:
    """Return the names of the states of a metric."""
    return list(metric._defaults)
