"""How often to mirror: the interval that loses least time, and that all ranks can agree on.

A version that is mirrored costs training a little; one that is not costs the steps behind the last one when a worker
fails. With `n` steps of `t` seconds between two versions, a cost of `c` per version, failures at rate `f` and `r`
seconds per recovery, the share of time that is progress is, as a renewal process whose failures may hit a recovery too
(after J. T. Daly, A higher order estimate of the optimum checkpoint interval, 2006):

    G(n) = n t f / (exp(f r) (exp(f (n t + c)) - 1))

Ranks measure different costs, and must mirror the same steps. So each says which intervals it could live with, as bits
of a number, and the shortest that all have named is taken: no rank needs to know what another has measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1

INTERVALS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Steps between two versions that ranks choose from."""
ANY = (1 << len(INTERVALS)) - 1
"""The word of a rank that could live with every interval, or does not know yet."""
PROBE_INTERVAL = 2
"""While costs are measured: every other step, so that steps with and without a version are seen side by side."""
PROBE_STEPS = 40
_SECONDS_PER_DAY = 86400.0
_HOPELESS = 700.0
"""Failures between two versions on average, from which on none is ever reached."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What is known of a run.

    Args:
        step_s: seconds of a step beside which nothing is mirrored.
        version_s: seconds that a step takes longer when a version is mirrored beside it.
        failures_per_s: rate of failures of the whole run.
        recovery_s: seconds that a recovery takes, the steps that are run again left out.
    """

    step_s: float
    version_s: float
    failures_per_s: float
    recovery_s: float


@dataclass(frozen=True, slots=True)
class CadencePlan:
    """An interval, and why."""

    interval: int
    reason: str


def goodput(costs: Costs, interval: int) -> float:
    """Share of time that is progress when a version is mirrored every `interval` steps."""
    rate, useful_s = costs.failures_per_s, interval * costs.step_s
    if rate * (useful_s + costs.version_s) > _HOPELESS:
        return 0.0
    return useful_s * rate / (exp(rate * costs.recovery_s) * expm1(rate * (useful_s + costs.version_s)))


def overhead(costs: Costs, interval: int) -> float:
    """Share by which mirroring lengthens training while nothing fails."""
    return costs.version_s / (interval * costs.step_s)


def plan_cadence(costs: Costs, budget: float) -> CadencePlan:
    """Choose the interval with the most progress among those whose overhead is within the budget.

    Args:
        costs: of this rank.
        budget: largest overhead, e.g. 0.01.
    """
    assert costs.step_s > 0 and costs.failures_per_s > 0 and budget > 0
    within = [n for n in INTERVALS if overhead(costs, n) <= budget]
    chosen = max(within, key=lambda n: goodput(costs, n)) if within else INTERVALS[-1]
    limit = f"the budget of {budget:.1%} takes {within[0]} or more" if within else f"no interval is within {budget:.1%}"
    reason = (
        f"a version every {_steps(chosen)}: it costs {1e3 * costs.version_s:.2f} ms, a step takes "
        f"{1e3 * costs.step_s:.2f} ms, so {overhead(costs, chosen):.2%} of the time; {limit}; with "
        f"{_SECONDS_PER_DAY * costs.failures_per_s:.2g} failures a day {goodput(costs, chosen):.4%} of it is progress"
    )
    return CadencePlan(chosen, reason)


def failure_rate(expected_per_day: float, observed: int, observed_s: float) -> float:
    """Failures per second: the user's expectation, weighed as one failure that was seen, and what was seen since.

    Args:
        expected_per_day: failures of the whole run.
        observed: failures so far.
        observed_s: for so long.
    """
    return (1 + observed) / (_SECONDS_PER_DAY / expected_per_day + observed_s)


def word(interval: int) -> int:
    """What a rank says that needs at least this interval: a bit for each that it could live with."""
    return sum(1 << place for place, choice in enumerate(INTERVALS) if choice >= interval)


def agreed(words: int) -> int:
    """The shortest interval that every rank could live with.

    Args:
        words: the bits that all words have in common.
    """
    return next((choice for place, choice in enumerate(INTERVALS) if words >> place & 1), INTERVALS[-1])


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"
