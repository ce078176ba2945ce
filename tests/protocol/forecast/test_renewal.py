"""The closed form agrees with Daly's formula, with direct summation, and with the simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_ckptless.protocol.forecast.failure_model import FailureModel, Gaps, Repair
from lightning_ckptless.protocol.forecast.renewal import closed_form, node_recovery_s, renewal_goodput
from lightning_ckptless.protocol.forecast.simulation import simulate
from lightning_ckptless.protocol.mirror_interval import Costs, goodput
from tests.protocol.forecast.jobs import job_of

INCIDENTS = 20_000
TOLERANCE = 0.002


@given(
    shape=st.sampled_from([1.0, 0.62, 1.5]),
    interval=st.sampled_from([1, 5, 50]),
    lost=st.floats(0.01, 0.3),
    recovery=st.floats(0.0, 1.0),
    version=st.floats(0.0, 0.2),
    seed=st.integers(0, 1000),
)
@example(shape=0.62, interval=1, lost=0.3, recovery=0.9, version=0.0, seed=1)
@settings(max_examples=8, derandomize=True, deadline=None)
def test_the_simulation_agrees_with_the_closed_form(
    shape: float, interval: int, lost: float, recovery: float, version: float, seed: int
) -> None:
    """Both are within 0.2 %.

    Args:
        shape: Weibull shape of the gaps.
        interval: steps between versions.
        lost: duration of a recovery and a segment, as a share of the mean gap.
        recovery: share of the recovery in that.
        version: cost of a version, as a share of a segment.
        seed: seed of the incidents.
    """
    mean_s = 1000.0
    segment_s, recovery_s = max(0.01, 1 - recovery) * lost * mean_s, recovery * lost * mean_s
    job = job_of(
        4,
        mirror_every_n_steps=interval,
        step_s=segment_s * (1 - version) / interval,
        version_s=segment_s * version,
        in_place_s=recovery_s,
        relaunch_s=recovery_s,
    )
    failures = FailureModel(1 / (4 * mean_s), Repair(0.0, 0.0), shape, process_share=1.0)
    horizon_s = INCIDENTS * mean_s
    outcome = simulate(job, failures.draw(np.random.default_rng(seed), 4, 4, horizon_s), horizon_s)
    # The number of incidents is known; without its noise, fewer of them suffice.
    without = job.segment.useful_s / job.segment.total_s
    simulated = without - (without - outcome.ettr) * INCIDENTS / outcome.incidents
    formula = closed_form(job, failures, bursts=False, trace=False)
    assert formula.left_out == []
    assert simulated == pytest.approx(formula.ettr, abs=TOLERANCE)


@given(st.floats(1e-5, 1e-2), st.floats(0.0, 60.0), st.sampled_from([1, 10, 100]))
def test_exponential_gaps_give_the_formula_of_the_mirror_interval(rate: float, recovery_s: float, n: int) -> None:
    costs = Costs(step_s=1.0, version_s=0.1, failures_per_s=rate, recovery_s=recovery_s)
    found = renewal_goodput(Gaps(1 / rate), n * 1.0, n * 1.0 + 0.1, recovery_s)
    assert found == pytest.approx(goodput(costs, n))


@pytest.mark.parametrize("shape", [0.5, 0.62, 1.3])
@pytest.mark.parametrize("segment_s", [0.5, 20.0])
def test_blocks_of_terms_sum_like_single_terms(shape: float, segment_s: float) -> None:
    gaps = Gaps(1000.0, shape)
    terms = gaps.survival(3.0 + segment_s * np.arange(1, 2_000_000, dtype=np.float64))
    assert renewal_goodput(gaps, segment_s, segment_s, 3.0) == pytest.approx(
        segment_s * float(terms.sum()) / 1000.0, rel=1e-5
    )


def test_the_summed_form_is_continuous_in_the_shape() -> None:
    exact = renewal_goodput(Gaps(1000.0), 10.0, 10.0, 5.0)
    assert renewal_goodput(Gaps(1000.0, 1.0 + 1e-9), 10.0, 10.0, 5.0) == pytest.approx(exact, rel=1e-5)


def test_no_segment_is_ever_completed() -> None:
    assert renewal_goodput(Gaps(1.0), 1000.0, 1000.0, 0.0) == 0.0
    assert renewal_goodput(Gaps(1.0), 1.0, 1.0, 1000.0) == 0.0


def test_what_the_closed_form_leaves_out_is_named() -> None:
    failures = FailureModel(1e-6, Repair(1.0, 1.0), process_share=0.5)
    found = closed_form(job_of(), failures, bursts=True, trace=True)
    assert len(found.left_out) == 4
    assert "losses that memory does not cover" in found.left_out


def test_a_node_is_recovered_by_the_slower_of_relaunch_and_join() -> None:
    assert node_recovery_s(job_of(relaunch_s=50.0)) == 30.0
    assert node_recovery_s(job_of(relaunch_s=50.0, in_place=False)) == 50.0
    assert node_recovery_s(job_of(1, relaunch_s=50.0)) == 50.0
