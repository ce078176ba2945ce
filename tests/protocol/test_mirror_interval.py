"""The interval between two versions: within the budget, best by the formula, and the same on all ranks."""

from __future__ import annotations

import random
from functools import reduce
from operator import and_

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.mirror_interval import (
    ANY,
    INTERVALS,
    Costs,
    agreed,
    failure_rate,
    goodput,
    overhead,
    plan_interval,
    word,
)

SECONDS = st.floats(1e-4, 10.0)
COSTS = st.builds(
    Costs,
    step_s=SECONDS,
    version_s=st.floats(0.0, 1.0),
    failures_per_s=st.floats(1e-7, 1e-2),
    recovery_s=st.floats(0.0, 100.0),
)


@given(COSTS, st.floats(1e-3, 0.5))
def test_the_best_interval_within_the_budget_is_chosen(costs: Costs, budget: float) -> None:
    plan = plan_interval(costs, budget)
    within = [n for n in INTERVALS if overhead(costs, n) <= budget]
    if within:
        assert plan.interval in within
        assert all(goodput(costs, plan.interval) >= goodput(costs, n) for n in within)
    else:
        assert plan.interval == INTERVALS[-1]
        assert "no interval is within" in plan.reason


def test_without_costs_every_step_is_mirrored() -> None:
    assert plan_interval(Costs(0.1, 0.0, 1e-5, 1.0), 0.01).interval == 1


def test_rare_failures_and_expensive_versions_give_a_long_interval() -> None:
    costs = Costs(step_s=0.01, version_s=0.004, failures_per_s=1 / 86400, recovery_s=1.0)
    plan = plan_interval(costs, 0.01)
    assert plan.interval == 1000
    assert plan.reason.startswith(
        "a version every 1000 steps: a version costs 4.00 ms and a step takes 10.00 ms, an overhead of 0.04%"
    )
    # Young: sqrt(2 c / f) / t = 2629 steps. With a failure every minute it is 69, and 50 is the best candidate.
    assert plan_interval(Costs(0.01, 0.004, 1 / 60, 1.0), 0.01).interval in (50, 100)


@pytest.mark.parametrize("interval", [1, 10, 200])
def test_the_formula_matches_a_simulation(interval: int) -> None:
    costs = Costs(step_s=1.0, version_s=2.0, failures_per_s=1 / 300, recovery_s=5.0)
    draw = random.Random(7)
    useful_s = clock_s = 0.0
    segment_s = interval * costs.step_s + costs.version_s
    for _ in range(20_000):
        wait_s = draw.expovariate(costs.failures_per_s)
        while wait_s < segment_s:
            clock_s += wait_s
            # A failure during a recovery restarts the recovery.
            while (until_s := draw.expovariate(costs.failures_per_s)) < costs.recovery_s:
                clock_s += until_s
            clock_s += costs.recovery_s
            wait_s = draw.expovariate(costs.failures_per_s)
        clock_s += segment_s
        useful_s += interval * costs.step_s
    assert useful_s / clock_s == pytest.approx(goodput(costs, interval), rel=0.02)


def test_the_failure_rate_approaches_the_observed_one() -> None:
    assert failure_rate(1.0, 0, 0.0) == pytest.approx(1 / 86400)
    assert failure_rate(1.0, 10, 3600.0) > 10 * failure_rate(1.0, 0, 3600.0) / 2
    assert failure_rate(24.0, 100, 1e6) == pytest.approx(101 / (3600 + 1e6))


@given(st.lists(st.sampled_from(INTERVALS), min_size=1, max_size=8))
def test_ranks_agree_on_the_longest_interval_that_any_rank_needs(needs: list[int]) -> None:
    assert agreed(reduce(and_, map(word, needs))) == max(needs)
    assert agreed(reduce(and_, map(word, needs), ANY)) == max(needs)
