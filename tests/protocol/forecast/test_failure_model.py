"""Failure models draw incidents at the rate, with the gaps, bursts and repairs that they describe."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.forecast.failure_model import (
    FailureModel,
    Gaps,
    Repair,
    require_rate,
    spares_needed,
)
from lightning_ckptless.protocol.forecast.presets import PRESETS, REPAIR_MEAN_H, REPAIR_MEDIAN_H, preset
from tests.protocol.forecast.jobs import DAY_S, HOUR_S

REPAIR = Repair(REPAIR_MEDIAN_H * HOUR_S, REPAIR_MEAN_H * HOUR_S)
PER_NODE_S = require_rate(6.5)


@pytest.mark.parametrize("burst_share", [0.0, 0.5])
@pytest.mark.parametrize("shape", [1.0, 0.62])
def test_the_rate_per_node_includes_bursts(shape: float, burst_share: float) -> None:
    model = FailureModel(PER_NODE_S, REPAIR, shape, 0.25, burst_share, 3)
    incidents = model.draw(np.random.default_rng(1), 400, 4, 4000 * DAY_S)
    failures = sum(max(1, len(incident.nodes)) for incident in incidents)
    assert failures / (400 * 4000) == pytest.approx(6.5e-3, rel=0.03)
    assert sum(not incident.nodes for incident in incidents) / len(incidents) == pytest.approx(0.25, abs=0.02)
    assert [i.at_s for i in incidents] == sorted(i.at_s for i in incidents)


def test_a_burst_takes_neighbours_of_one_rack() -> None:
    model = FailureModel(PER_NODE_S, REPAIR, burst_share=1.0, burst_nodes=2)
    incidents = model.draw(np.random.default_rng(1), 10, 4, 20_000 * DAY_S)
    pairs = {incident.nodes for incident in incidents}
    assert pairs == {(0, 1), (1, 2), (2, 3), (4, 5), (5, 6), (6, 7), (8, 9)}
    assert all(len(incident.repairs_s) == 2 for incident in incidents)


def test_weibull_gaps_are_clustered_as_in_the_open_trace() -> None:
    gaps = Gaps(mean_s=850 * 60.0, shape=0.62)
    drawn = np.diff([0.0, *gaps.draw(np.random.default_rng(2), 40_000 * gaps.mean_s)])
    assert drawn.mean() == pytest.approx(gaps.mean_s, rel=0.03)
    # The coefficient of variation that is published with this shape is 1.76.
    assert drawn.std() / drawn.mean() == pytest.approx(1.7, abs=0.1)
    assert (drawn > HOUR_S).mean() == pytest.approx(float(gaps.survival(np.array([HOUR_S]))[0]), abs=0.01)


def test_repairs_have_the_published_median_and_mean() -> None:
    drawn = REPAIR.draw(np.random.default_rng(3), 200_000)
    assert np.median(drawn) / HOUR_S == pytest.approx(REPAIR_MEDIAN_H, rel=0.02)
    assert drawn.mean() / HOUR_S == pytest.approx(REPAIR_MEAN_H, rel=0.1)
    assert Repair(5.0, 5.0).draw(np.random.default_rng(3), 2).tolist() == [5.0, 5.0]
    assert Repair(0.0, 0.0).draw(np.random.default_rng(3), 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("nodes", "spares"), [(256, 2), (128, 1), (16, 1)])
def test_spares_are_too_few_in_one_percent_of_the_time(nodes: int, spares: int) -> None:
    """For repairs of 4 h, the probabilities are 0.29 %, 0.88 % and 0.015 %; one spare less is too few."""
    assert spares_needed(nodes * PER_NODE_S, Repair(4 * HOUR_S, 4 * HOUR_S)) == spares


def test_many_spares_follow_the_normal_distribution() -> None:
    just_below, just_above = (spares_needed(mean, Repair(1.0, 1.0)) for mean in (499.9, 500.1))
    assert abs(just_above - just_below) <= 3


@pytest.mark.parametrize("rate", [0.0, -6.5, float("nan")])
def test_a_rate_has_to_be_positive(rate: float) -> None:
    with pytest.raises(OptionsError, match="expected more than 0 failures per 1,000 node-days"):
        require_rate(rate)


def test_presets_follow_from_what_was_published() -> None:
    rates = {known.name: known.rate for known in PRESETS}
    assert rates["llama-3"] == pytest.approx(419 / 54 / (16_384 / 8) * 1000, abs=0.005)
    assert rates["rsc-jobs"] == pytest.approx(24 / 7.9 / (1024 / 8) * 1000, abs=0.01)
    assert rates["hsdp-100k"] == pytest.approx(24 * 60 / 18 / (100_000 / 8) * 1000, abs=0.005)
    # The published projection of 1.8 h at 16,384 GPUs belongs to the rate of RSC-1.
    assert 24 / (rates["rsc-1"] / 1000 * 16_384 / 8) == pytest.approx(1.8, abs=0.01)
    assert preset("infinitehbd").shape == 0.62
    assert all(known.source and known.basis for known in PRESETS)
    with pytest.raises(OptionsError, match="expected one of rsc-1"):
        preset("rsc-3")
