"""The metrics on a single CPU process; ranks are separate instances that are merged."""

from __future__ import annotations

import doctest
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless import metrics
from lightning_ckptless.metrics import Goodput, RecoveryTime
from lightning_ckptless.protocol.phases import PHASE_FIELDS, Phases

SHORT = Phases(detect_s=0.5, regroup_s=0.25)
LONG = Phases(detect_s=0.5, restore_s=1.0, replay_s=0.5)


def values(metric: RecoveryTime) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def test_the_examples_in_docstrings_work() -> None:
    results = doctest.testmod(metrics)
    assert results.attempted > 0
    assert results.failed == 0


@given(st.lists(st.tuples(st.floats(0.0, 1e6), st.floats(0.0, 1e6)), min_size=1, max_size=10), st.integers(0, 10))
def test_merged_goodput_is_that_of_all_spans(spans: list[tuple[float, float]], cut: int) -> None:
    whole, first, second = Goodput(), Goodput(), Goodput()
    for number, (productive_s, lost_s) in enumerate(spans):
        for metric in (whole, first if number < cut else second):
            metric.update(productive_s, productive_s + lost_s)
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(whole.compute().item(), nan_ok=True)


def test_goodput_adds_small_steps_to_long_times() -> None:
    goodput = Goodput()
    goodput.update(productive_s=0.0, wall_s=1e8)
    for _ in range(100):
        goodput.update(productive_s=0.1, wall_s=0.1)
    assert goodput.wall_s.item() == pytest.approx(1e8 + 10.0, abs=1e-3)


@pytest.mark.parametrize(("productive_s", "wall_s"), [(2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_goodput_refuses_an_invalid_span(productive_s: float, wall_s: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= productive_s <= wall_s"):
        Goodput().update(productive_s, wall_s)


def test_recoveries_and_their_phases() -> None:
    recovery_time = RecoveryTime()
    recovery_time.update(LONG, ended_at=10.0)
    recovery_time.update(SHORT, ended_at=20.0)
    assert values(recovery_time) == {
        "mean_s": 1.375,
        "max_s": 2.0,
        "last_s": 0.75,
        "detect_s": 0.5,
        "abort_s": 0.0,
        "regroup_s": 0.125,
        "restore_s": 0.5,
        "replay_s": 0.25,
        "other_s": 0.0,
    }


@pytest.mark.parametrize("late_rank_merges", [False, True])
def test_merged_recoveries_keep_the_longest_and_the_last(late_rank_merges: bool) -> None:
    early, late = RecoveryTime(), RecoveryTime()
    early.update(LONG, ended_at=10.0)
    late.update(SHORT, ended_at=20.0)
    into, other = (late, early) if late_rank_merges else (early, late)
    into.merge_state(other)
    merged = values(into)
    assert (merged["mean_s"], merged["max_s"], merged["last_s"]) == (1.375, 2.0, 0.75)


def test_forward_returns_the_batch_value_and_accumulates() -> None:
    recovery_time = RecoveryTime()
    assert recovery_time(LONG, ended_at=10.0)["mean_s"].item() == 2.0
    assert recovery_time(SHORT, ended_at=20.0)["mean_s"].item() == 0.75
    assert values(recovery_time)["mean_s"] == 1.375
    assert values(recovery_time)["last_s"] == 0.75


def test_reset_clears_all_state() -> None:
    recovery_time, goodput = RecoveryTime(), Goodput()
    recovery_time.update(LONG, ended_at=10.0)
    goodput.update(1.0, 2.0)
    recovery_time.reset()
    goodput.reset()
    recovery_time.update(SHORT, ended_at=5.0)
    goodput.update(1.0, 1.0)
    assert (values(recovery_time)["max_s"], values(recovery_time)["last_s"]) == (0.75, 0.75)
    assert goodput.compute().item() == 1.0


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_metrics_without_updates_are_nan() -> None:
    assert math.isnan(Goodput().compute().item())
    nothing = values(RecoveryTime())
    assert set(nothing) == {"mean_s", "max_s", "last_s", *PHASE_FIELDS}
    assert all(math.isnan(value) for value in nothing.values())


def test_metrics_survive_pickling() -> None:
    recovery_time = RecoveryTime()
    recovery_time.update(LONG, ended_at=10.0)
    assert values(pickle.loads(pickle.dumps(recovery_time)))["max_s"] == 2.0
