"""The goodput benchmark: its failures, its forecasts, and its tables, without a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.goodput import (
    GRID,
    INTERVALS,
    MODELS,
    MTBF_S,
    RANKS,
    WITHIN_S,
    Goodput,
    Trial,
    forecast_of,
    job_of,
    measured_goodput,
    trials,
)
from lightning_ckptless.ledger import Event

COSTS = {"step_s": 0.1, "version_s": 0.0, "in_place_s": 0.4, "relaunch_s": 3.0}
HORIZON_S = 20_000.0


@pytest.mark.parametrize("model", MODELS)
def test_failures_have_the_rate_of_their_model(model: str) -> None:
    kills = Trial("t", model, 5.0).kills(HORIZON_S)
    assert len(kills) / (2 if model == MODELS[2] else 1) == pytest.approx(HORIZON_S / 5.0, rel=0.1)
    assert {rank for _, rank in kills} == set(range(RANKS))
    assert kills == sorted(kills) == Trial("other", model, 5.0).kills(HORIZON_S)


def test_a_burst_takes_two_ranks_within_a_second() -> None:
    kills = Trial("t", MODELS[2], 1000.0).kills(HORIZON_S)
    pairs = list(zip(kills[::2], kills[1::2], strict=True))
    assert all(second[0] - first[0] <= WITHIN_S and first[1] != second[1] for first, second in pairs)


def test_every_model_is_tried_at_every_rate_with_failures_of_its_own() -> None:
    found = trials(24)
    assert {(trial.model, trial.mtbf_s) for trial in found} == {(m, s) for m in MODELS for s in MTBF_S}
    assert len({trial.seed for trial in found}) == len({trial.name for trial in found}) == 24
    assert {trial.every for trial in GRID} == set(INTERVALS)
    for trial in GRID:
        assert [other.kills(HORIZON_S) == trial.kills(HORIZON_S) for other in GRID].count(True) == len(INTERVALS)


def test_the_forecast_counts_the_failures_that_it_is_given() -> None:
    job = job_of(COSTS, 1, 5.0)
    assert forecast_of(job, [], 10.0) == pytest.approx(1.0)
    # The recovery, and half a step that is replayed.
    assert forecast_of(job, [(5.05, 0)], 10.0) == pytest.approx(1 - 0.45 / 10.0, abs=2e-3)
    assert forecast_of(job, [(5.0, 0)], 10.0) == pytest.approx(1 - 0.45 / 10.0, abs=2e-3)
    assert forecast_of(job, [(15.0, 0)], 10.0) == pytest.approx(1.0)


def test_the_recommended_interval_depends_on_the_cost_of_a_version() -> None:
    cheap, dear = (job_of(COSTS | {"version_s": cost}, "auto", 5.0) for cost in (0.0, 0.2))
    assert (cheap.choices.mirror_every_n_steps, dear.choices.mirror_every_n_steps) == (1, 10)


def event(name: str, **fields: Any) -> Event:
    return Event(name, 1.0, 1, 0, fields)


def test_goodput_is_measured_from_the_first_batch_to_the_last() -> None:
    seconds: Mapping[str, float] = {"start": 50.0, "training": 8.0, "replay": 2.0, "idle": 40.0}
    report = {"began_at": 0.0, "until": 100.0, "seconds": seconds, "is_over": True, "failures": 0, "steps_replayed": 0}
    goodput, span_s = measured_goodput([event("time_spent", **report)])
    assert goodput == pytest.approx(0.8)
    assert span_s == pytest.approx(10.0)


def test_the_tables_name_what_missed_its_target() -> None:
    row = {"kills": [], "span_s": 30.0, "forecast": 0.9, "expected": 0.91, "spread": 0.01, "mtbf_s": 5.0, "every": 1}
    rows = [
        {**row, "model": model, "goodput": 0.9 + off} for model, off in zip(MODELS, (0.01, -0.03, 0.0), strict=True)
    ]
    grid = [{**row, "model": "", "every": every, "goodput": 0.9 - 0.01 * every} for every in (1, 2)]
    results = {"trials": rows, "grid": grid, "costs": COSTS, "recommended": 2}
    jobs, intervals = Goodput().tables(results)
    assert jobs.notes[0].endswith("median 1.00% (target 2%): met")
    assert jobs.notes[1] == "Worst: 3.00% (Weibull, k = 0.6, 5 s)"
    assert intervals.notes == ["Recommended: 2, 1.00% below the best, 1 (target 0.5%): missed"]
