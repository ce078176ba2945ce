"""The mean time between failures that a run has observed, with its exact confidence interval.

Failures at a constant rate, r of them in T seconds, are a Poisson process. The estimate is T / r, and the interval with
confidence 1 - a is that of the chi-square distribution for an observation that ends at a given time:

    2 T / chi2(1 - a/2, 2 r + 2)  ..  2 T / chi2(a/2, 2 r)

With an even number of degrees of freedom, half of a chi-square quantile is the mean of a Poisson distribution: for
2 r + 2 that at which r or fewer failures have the probability a/2, and for 2 r that at which r or more have it
(F. Garwood, Fiducial limits for the Poisson distribution, 1936). Both are found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import exp, inf, lgamma, log

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Mtbf:
    """An observed mean time between failures, in seconds.

    Args:
        failures: number of failures.
        mean_s: the estimate; infinite without a failure.
        low_s: lower end of the interval.
        high_s: upper end of the interval; infinite without a failure.
    """

    failures: int
    mean_s: float
    low_s: float
    high_s: float

    def __str__(self) -> str:
        if not self.failures:
            return f"no failure yet; with 95 % confidence, fewer than one in {self.low_s:.3g} s"
        return f"a failure every {self.mean_s:.3g} s (95 %: {self.low_s:.3g} s to {self.high_s:.3g} s)"


def observed_mtbf(failures: int, observed_s: float, confidence: float = CONFIDENCE) -> Mtbf:
    """Estimate the mean time between failures.

    Args:
        failures: failures observed.
        observed_s: duration of the observation, in seconds.
        confidence: probability with which the interval contains the true value.
    """
    least, most = _limits(failures, confidence)
    if not failures:
        return Mtbf(0, inf, observed_s / most, inf)
    return Mtbf(failures, observed_s / failures, observed_s / most, observed_s / least)


@cache
def _limits(failures: int, confidence: float) -> tuple[float, float]:
    """The limits of the expected number of failures, given the observed number."""
    tail = (1 - confidence) / 2
    most = _solve(lambda mean: poisson_cdf(failures, mean), tail, failures)
    least = _solve(lambda mean: poisson_cdf(failures - 1, mean), 1 - tail, failures) if failures else 0.0
    return least, most


def poisson_cdf(count: int, mean: float) -> float:
    """Probability of at most `count` events of a Poisson distribution."""
    if mean <= 0:
        return 1.0
    # From the largest term downwards, so that neither the terms nor their sum underflow too early.
    term = total = exp(count * log(mean) - mean - lgamma(count + 1))
    if count > mean:
        return 1.0 - _tail_above(count, mean)
    for number in range(count, 0, -1):
        term *= number / mean
        total += term
        if term <= 1e-17 * total:
            break
    return min(1.0, total)


def _tail_above(count: int, mean: float) -> float:
    """Probability of more than `count` events, for a `count` above the mean."""
    number = count + 1
    term = total = exp(number * log(mean) - mean - lgamma(number + 1))
    while term > 1e-17 * total:
        number += 1
        term *= mean / number
        total += term
    return total


def _solve(falling: Callable[[float], float], value: float, near: float) -> float:
    """The positive argument at which a falling function has a value."""
    low, high = 0.0, near + 10.0
    while falling(high) > value:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > value else (low, middle)
    return (low + high) / 2
