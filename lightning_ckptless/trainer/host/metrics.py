"""The state of torchmetrics, which is in no `state_dict` unless asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torchmetrics import Metric


def dump_metric(metric: Metric) -> dict[str, Any]:
    """What a metric has gathered, as tensors and plain data."""
    return {
        "states": {name: getattr(metric, name) for name in metric._defaults},
        "update_count": metric._update_count,
        "computed": metric._computed if _is_data(metric._computed) else None,
        "forward_cache": metric._forward_cache if _is_data(metric._forward_cache) else None,
    }


def load_metric(metric: Metric, saved: dict[str, Any]) -> None:
    """Put back what a metric had gathered."""
    for name, value in saved["states"].items():
        setattr(metric, name, _moved(value, metric.device))
    metric._update_count = saved["update_count"]
    metric._computed = _moved(saved["computed"], metric.device)
    metric._forward_cache = _moved(saved["forward_cache"], metric.device)


def metrics_of(modules: Iterable[tuple[str, Any]]) -> dict[str, Metric]:
    """The metrics among named modules."""
    return {name: module for name, module in modules if isinstance(module, Metric)}


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor | dict | list | tuple)


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return value
