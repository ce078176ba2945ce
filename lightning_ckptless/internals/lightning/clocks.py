"""Clock readings that Lightning keeps on its trainer and callbacks, and its measurements.

A reading is meaningless on another host, and the time between a version and its restoration is not training time.
Therefore a version stores the age of each reading, and a restore sets the reading to the same age, as if the clock had
been paused, like between a checkpoint file and the run that resumes from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

from lightning_ckptless.internals.lightning.distribution import is_subclass

# Bound at import time, so that a script or test that patches `time` does not affect this module.
CLOCKS: dict[str, Callable[[], float]] = {"monotonic": time.monotonic, "perf_counter": time.perf_counter}
_READINGS: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("callbacks", "Timer"): ("monotonic", ("_start_time", "_end_time")),
    ("callbacks", "ModelCheckpoint"): ("monotonic", ("_last_time_checked",)),
    ("callbacks", "ThroughputMonitor"): ("perf_counter", ("_t0s",)),
    ("trainer.trainer", "Trainer"): ("monotonic", ("_train_start_time", "_last_val_time")),
}
"""By class: the function of `time`, and the attributes with readings, single or in dictionaries."""


def readings_of(owner: Any) -> tuple[str, ...]:
    """Return the names of the attributes of a callback or trainer that are clock readings."""
    return _READINGS[kind][1] if (kind := _kind_of(owner.__class__)) else ()


def ages_of(owner: Any) -> dict[str, Any]:
    """Return the seconds since each reading."""
    names = readings_of(owner)
    if not names:
        return {}
    now = _now(owner)
    return {name: _mapped(vars(owner)[name], lambda reading: now - reading) for name in names if name in vars(owner)}


def set_ages(owner: Any, saved: dict[str, Any]) -> None:
    """Set each reading to its saved age in seconds."""
    now = _now(owner)
    vars(owner).update({name: _mapped(ages, lambda age: now - age) for name, ages in saved.items()})


@cache
def _kind_of(cls: type) -> tuple[str, str] | None:
    return next((kind for kind in _READINGS if is_subclass(cls, *kind)), None)


def _now(owner: Any) -> float:
    kind = _kind_of(owner.__class__)
    return CLOCKS[_READINGS[kind][0]]() if kind else 0.0


def _mapped(value: Any, function: Callable[[float], float]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    return None if value is None else function(value)


# ---------------------------------------------------------------------- measurements


def windows_of(callback: Any) -> dict[Any, dict[str, list[Any]]]:
    """Return the latest values from which a `ThroughputMonitor` computes rates, by stage; empty for other callbacks."""
    return {stage: {name: list(values) for name, values in windows} for stage, windows in _windows(callback)}


def set_windows(callback: Any, saved: dict[Any, dict[str, list[Any]]]) -> None:
    """Restore the result of `windows_of`; otherwise values that do not increase raise an error at the next batch."""
    for stage, windows in _windows(callback):
        for name, values in windows:
            values.clear()
            # `append` refuses values that do not increase, `extend` does not.
            values.extend(saved.get(stage, {}).get(name, ()))


def _windows(callback: Any) -> list[tuple[Any, list[tuple[str, Any]]]]:
    if not is_subclass(callback.__class__, "callbacks", "ThroughputMonitor"):
        return []
    return [
        (stage, [(name, values) for name, values in vars(throughput).items() if hasattr(values, "extend")])
        for stage, throughput in callback._throughputs.items()
    ]
