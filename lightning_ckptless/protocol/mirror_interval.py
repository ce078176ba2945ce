"""How often to mirror: the interval with the highest goodput that all ranks agree on.

Mirroring a version slows training down a little. Not mirroring one costs the steps since the last version when a worker
fails. With `n` steps of `t` seconds between two versions, a cost of `c` per version, failures at rate `f` and `r`
seconds per recovery, the goodput is that of a renewal process whose failures may also hit a recovery (after J. T. Daly,
A higher order estimate of the optimum checkpoint interval, 2006):

    G(n) = n t f / (exp(f r) (exp(f (n t + c)) - 1))

Ranks measure different costs but must mirror the same steps. So each rank sends the set of intervals that it accepts,
as the bits of an integer, and the shortest interval that all ranks accept is used. No rank needs to know the
measurements of another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1

INTERVALS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""The candidate intervals, in steps."""
ANY = (1 << len(INTERVALS)) - 1
"""The bits of a rank that accepts every interval, or has not yet measured its costs."""
PROBE_INTERVAL = 2
"""Interval while costs are measured: every other step, to compare steps with and without a version."""
PROBE_STEPS = 40
_SECONDS_PER_DAY = 86400.0
_HOPELESS = 700.0
"""Average number of failures between two versions above which the next version is never reached."""


@dataclass(frozen=True, slots=True)
class Costs:
    """The measured and estimated costs of a run.

    Args:
        step_s: duration of a step without mirroring, in seconds.
        version_s: additional duration of a step while a version is mirrored, in seconds.
        failures_per_s: failure rate of the whole run.
        recovery_s: duration of a recovery without the replayed steps, in seconds.
    """

    step_s: float
    version_s: float
    failures_per_s: float
    recovery_s: float


@dataclass(frozen=True, slots=True)
class IntervalPlan:
    """An interval, the reason for it, and the costs that led to it."""

    interval: int
    reason: str
    costs: Costs


def goodput(costs: Costs, interval: int) -> float:
    """Expected goodput if a version is mirrored every `interval` steps, as a fraction."""
    rate, useful_s = costs.failures_per_s, interval * costs.step_s
    if rate * (useful_s + costs.version_s) > _HOPELESS:
        return 0.0
    return useful_s * rate / (exp(rate * costs.recovery_s) * expm1(rate * (useful_s + costs.version_s)))


def overhead(costs: Costs, interval: int) -> float:
    """Relative slowdown of training by mirroring without failures, as a fraction."""
    return costs.version_s / (interval * costs.step_s)


def plan_interval(costs: Costs, budget: float) -> IntervalPlan:
    """Choose the interval with the highest goodput among those whose overhead is within the budget.

    Args:
        costs: costs measured on this rank.
        budget: largest acceptable overhead as a fraction, e.g. 0.01.
    """
    assert costs.step_s > 0 and costs.failures_per_s > 0 and budget > 0
    within = [n for n in INTERVALS if overhead(costs, n) <= budget]
    chosen = max(within, key=lambda n: goodput(costs, n)) if within else INTERVALS[-1]
    limit = (
        f"the budget of {budget:.1%} requires {within[0]} or more"
        if within
        else f"no interval is within the budget of {budget:.1%}"
    )
    reason = (
        f"a version every {_steps(chosen)}: a version costs {1e3 * costs.version_s:.2f} ms and a step takes "
        f"{1e3 * costs.step_s:.2f} ms, an overhead of {overhead(costs, chosen):.2%}; {limit}; at "
        f"{_SECONDS_PER_DAY * costs.failures_per_s:.2g} failures a day the expected goodput is "
        f"{goodput(costs, chosen):.4%}"
    )
    return IntervalPlan(chosen, reason, costs)


def failure_rate(expected_per_day: float, observed: int, observed_s: float) -> float:
    """Estimate the failures per second. The user's expectation has the weight of one observed failure.

    Args:
        expected_per_day: expected failures of the whole run per day.
        observed: failures observed so far.
        observed_s: duration of the observation, in seconds.
    """
    return (1 + observed) / (_SECONDS_PER_DAY / expected_per_day + observed_s)


def word(interval: int) -> int:
    """The intervals accepted by a rank that needs at least this one, as bits."""
    return sum(1 << index for index, choice in enumerate(INTERVALS) if choice >= interval)


def agreed(words: int) -> int:
    """The shortest interval that every rank accepts.

    Args:
        words: bitwise AND of the words of all ranks.
    """
    return next((choice for index, choice in enumerate(INTERVALS) if words >> index & 1), INTERVALS[-1])


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"
