"""The comparison over cluster sizes reproduces what was published, under named assumptions."""

from __future__ import annotations

import pytest

from lightning_ckptless.protocol.forecast.failure_model import FailureModel, Gaps, Repair, require_rate
from lightning_ckptless.protocol.forecast.presets import preset
from lightning_ckptless.protocol.forecast.renewal import renewal_goodput
from lightning_ckptless.protocol.forecast.schemes import checkpoint_goodput, compare_schemes
from tests.protocol.forecast.jobs import COSTS, job_of

NAMES = ["checkpoint and restart", "fast restart, 47 s", "ckptless, relaunch", "ckptless, in place"]


def failures_of(name: str, process_share: float = 0.0) -> FailureModel:
    """Failures at a published rate."""
    return FailureModel(require_rate(preset(name).rate), Repair(0.0, 0.0), process_share=process_share)


def test_goodput_falls_with_the_size_of_the_cluster() -> None:
    found = compare_schemes(job_of(100), failures_of("rsc-1", 0.5))
    assert [curve.name for curve in found.curves] == NAMES
    assert 800 in found.ranks and max(found.ranks) > 100_000
    for curve in found.curves:
        assert all(a >= b - 1e-9 for a, b in zip(curve.ettr, curve.ettr[1:], strict=False)) or "ckptless" in curve.name
    restart, fast, relaunch, in_place = (curve.ettr[-1] for curve in found.curves)
    assert restart < fast and restart < relaunch < in_place


def test_the_claims_of_fast_recovery_follow_from_their_assumptions() -> None:
    """15 to 30 minutes against two, and 95 % goodput at more than 2,300 accelerators (288 nodes)."""
    measured, cluster = failures_of("rsc-jobs").gaps(288), failures_of("rsc-1").gaps(288)
    # At the failure rate that was measured for jobs of 1,024 GPUs, restarts cost a sixth of the time ...
    slow = [checkpoint_goodput(measured, COSTS, 20.0, minutes * 60.0) for minutes in (15, 30)]
    assert slow == pytest.approx([0.880, 0.819], abs=0.001)
    # ... and a recovery in two minutes, with a step replayed, keeps 99 %.
    assert renewal_goodput(measured, 10.0, 10.0, 120.0) == pytest.approx(0.990, abs=0.001)
    # At the rate of the whole cluster, restarts alone already keep 95 %: the claim needs the higher rate.
    assert checkpoint_goodput(cluster, COSTS, 20.0, 900.0) > 0.95


def test_a_checkpoint_interval_is_the_best_one() -> None:
    gaps = Gaps(3 * 3600.0)
    every = max(renewal_goodput(gaps, n * 10.0, n * 10.0 + 20.0, 720.0) for n in range(1, 400))
    assert checkpoint_goodput(gaps, COSTS, 20.0, 720.0) == pytest.approx(every, abs=2e-4)


@pytest.mark.parametrize(
    ("mtbf_s", "recovery_s", "interval_s", "checkpoint_s", "expected"),
    [
        (3 * 3600.0, 720.0, 1800.0, 20.0, 0.8495),
        (3 * 3600.0, 10.0, 10.0, 0.1, 0.9887),
        (1080.0, 600.0, 300.0, 5.0, 0.4884),
        (60.0, 3.0, 1.0, 0.01, 0.9339),
    ],
)
def test_known_values(
    mtbf_s: float, recovery_s: float, interval_s: float, checkpoint_s: float, expected: float
) -> None:
    found = renewal_goodput(Gaps(mtbf_s), interval_s, interval_s + checkpoint_s, recovery_s)
    assert found == pytest.approx(expected, abs=1e-4)
