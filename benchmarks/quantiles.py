"""Statistics of repeats: quantiles and a linear fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


def quantile(values: Sequence[float], part: float) -> float:
    """Return a quantile, interpolated between the two nearest values.

    Args:
        values: at least one.
        part: 0.5 for the median, 0.95 for the 95th percentile.
    """
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def median(values: Sequence[float]) -> float:
    """Return the median of at least one value."""
    return quantile(values, 0.5)


@dataclass(frozen=True, slots=True)
class StraightLine:
    """`y = fixed + slope * x`."""

    fixed: float
    slope: float


def fit_line(points: Sequence[tuple[float, float]]) -> StraightLine:
    """Fit a line by least squares to points `(x, y)`, at least two of which differ in x.

    Points are weighted by `1 / (1 + x)**2`: the spread of a time grows with the size, and small sizes determine the
    fixed part.
    """
    weights = [1.0 / (1.0 + x) ** 2 for x, _ in points]
    total = sum(weights)
    x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y_mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, points, strict=True)) / spread
    return StraightLine(y_mean - slope * x_mean, slope)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return mean, median, 95th percentile, minimum and maximum."""
    return {
        "mean": fmean(values),
        "p50": median(values),
        "p95": quantile(values, 0.95),
        "min": min(values),
        "max": max(values),
    }
