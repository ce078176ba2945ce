"""Recommended options are those that cost the least node time, compared under the same incidents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lightning_ckptless.protocol.forecast.failure_model import FailureModel, Repair, require_rate
from lightning_ckptless.protocol.forecast.forecast import Forecast, forecast
from lightning_ckptless.protocol.forecast.inputs import forecastable, inputs_from
from lightning_ckptless.protocol.forecast.recommendation import ORDER, TOLERANCES, candidates
from lightning_ckptless.protocol.forecast.renewal import renewal_goodput
from tests.protocol.forecast.jobs import DAY_S, HOUR_S, job_of

REPAIR = Repair(20 * HOUR_S, 100 * HOUR_S)


def recommended(**changes: Any) -> Forecast:
    """The forecast of a job of 256 nodes with many failures."""
    values = {"nodes": 256, "step_s": 10.0, "rate": 20.0, "trials": 10, "days": 20.0} | changes
    what = forecastable(inputs_from(values), None)
    return forecast(what, np.random.default_rng(1), lambda *_: None, alternatives=True)


def test_bursts_call_for_copies_in_another_rack() -> None:
    found = recommended(burst_share=0.2, repair_median_h=4.0, repair_mean_h=4.0)
    assert found.recommendation is not None and found.recommended is not None
    assert found.recommendation.choices.failure_domain == "rack"
    assert found.recommendation.choices.copies == 1
    assert found.expected.uncovered > found.independent.uncovered
    assert found.expected.uncovered > 1 > found.recommended.uncovered
    assert found.recommended.ettr > found.expected.ettr
    assert found.expected.uncovered_after_s < found.recommended.uncovered_after_s


def test_independent_failures_hide_what_racks_are_for() -> None:
    found = recommended(burst_share=0.0)
    assert found.recommendation is not None
    assert found.recommendation.choices.failure_domain == "node"


def test_every_option_has_one_chosen_and_one_given_value() -> None:
    found = recommended()
    assert found.recommendation is not None
    rows = found.recommendation.alternatives
    assert tuple(dict.fromkeys(row.option for row in rows)) == ORDER
    for option in ORDER:
        of_option = [row for row in rows if row.option == option]
        assert sum(row.given for row in of_option) == 1
        (chosen,) = (row for row in of_option if row.chosen)
        assert chosen.value == getattr(found.recommendation.choices, option)
        assert chosen.efficiency >= max(row.efficiency for row in of_option) - TOLERANCES.get(option, 0.0)


def test_the_mirror_interval_is_the_best_of_the_closed_form() -> None:
    found = recommended(version_s=1.0, process_share=1.0, burst_share=0.0, mirror_every_n_steps=3)
    assert found.recommendation is not None
    rows = [row for row in found.recommendation.alternatives if row.option == "mirror_every_n_steps"]
    gaps = FailureModel(require_rate(20.0), REPAIR, process_share=1.0).gaps(256)
    durable = [replace(found.job, choices=replace(found.job.choices, mirror_every_n_steps=row.value)) for row in rows]
    assert [row.ettr for row in rows] == pytest.approx(
        [renewal_goodput(gaps, job.segment.useful_s, job.segment.total_s, 0.3) for job in durable]
    )
    best = max(rows, key=lambda row: row.ettr)
    assert best.chosen and 3 in [row.value for row in rows]


def test_too_few_spares_and_too_many_both_cost() -> None:
    found = recommended()
    assert found.recommendation is not None
    rows = [row for row in found.recommendation.alternatives if row.option == "spares"]
    by_value = sorted(rows, key=lambda row: row.value)
    assert by_value[0].efficiency < max(row.efficiency for row in rows) > by_value[-1].efficiency


def test_no_durable_state_is_examined_last_and_not_preferred() -> None:
    failures = FailureModel(require_rate(6.5), REPAIR, process_share=1.0)
    assert list(candidates("durable_every_s", job_of(durable_every_s=50.0), failures))[-2:] == [50.0, None]
    found = recommended(process_share=1.0)
    assert found.recommendation is not None
    assert found.recommendation.choices.durable_every_s == DAY_S


def test_too_many_copies_for_the_cluster_are_no_candidate() -> None:
    found = recommended(nodes=3, rate=50.0)
    assert found.recommendation is not None
    assert max(row.value for row in found.recommendation.alternatives if row.option == "copies") == 2


def test_the_same_seed_gives_the_same_forecast() -> None:
    assert recommended(days=5.0) == recommended(days=5.0)
