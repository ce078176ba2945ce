"""Productive and lost time, from lists of instants instead of a clock."""

from __future__ import annotations

import json
from math import fsum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.goodput import GoodputAccount, Loss, Phases, phases_from

NAMES = ("fault_at", "detected_at", "stopped_at", "regrouped_at", "restored_at", "first_step_done_at")
spans = st.floats(0.0, 100.0)
instants = st.lists(st.none() | st.floats(0.0, 1e9), min_size=6, max_size=6)


def split(*at: float | None) -> Phases:
    return phases_from(**dict(zip(NAMES, at, strict=True)))


def test_phases_between_known_instants() -> None:
    assert split(10.0, 11.0, 13.0, 16.0, 20.0, 25.0) == Phases(1.0, 2.0, 3.0, 4.0, 5.0)


def test_the_time_around_an_unknown_instant_goes_to_other() -> None:
    assert split(10.0, None, 13.0, 16.0, 20.0, 25.0) == Phases(regroup_s=3.0, restore_s=4.0, replay_s=5.0, other_s=3.0)
    assert split(10.0, None, None, None, None, 25.0) == Phases(other_s=15.0)


def test_an_unknown_end_shortens_the_total() -> None:
    assert split(None, 11.0, 13.0, 16.0, 20.0, None) == Phases(abort_s=2.0, regroup_s=3.0, restore_s=4.0)
    assert split(*[None] * 6) == Phases()


def test_an_instant_before_its_predecessor_is_moved_there() -> None:
    assert split(10.0, 9.0, 13.0, 16.0, 20.0, 25.0) == Phases(0.0, 3.0, 3.0, 4.0, 5.0)


@given(instants)
def test_phases_sum_to_the_time_between_the_known_instants(at: list[float | None]) -> None:
    phases = split(*at)
    known = [instant for instant in at if instant is not None]
    assert phases.total_s == pytest.approx(max(known) - known[0] if known else 0.0)
    assert phases.down_s + phases.replay_s == phases.total_s


def test_steps_and_stalls() -> None:
    account = GoodputAccount(began_at=100.0)
    account.record_step(102.0, 105.0, stall_s=1.0)
    account.record_step(105.0, 108.0)
    report = account.report(110.0)
    assert (report.productive_s, report.wall_s, report.goodput) == (5.0, 10.0, 0.5)
    assert {loss: lost_s for loss, lost_s in report.lost.items() if lost_s} == {Loss.MIRROR_STALL: 1.0, Loss.OTHER: 4.0}


def test_a_recovery_costs_the_discarded_work_and_the_outage_but_not_the_replayed_step() -> None:
    account = GoodputAccount(began_at=0.0)
    account.record_step(0.0, 10.0)
    saved = account.to_dict()
    account.record_step(10.0, 20.0)

    account = GoodputAccount.from_dict(saved)
    account.record_step(40.0, 50.0)
    account.record_recovery(split(25.0, 26.0, 28.0, 32.0, 39.0, 50.0))
    report = account.report(50.0)

    assert account.recoveries == 1
    assert report.productive_s == 20.0
    assert report.lost == {
        Loss.DETECT: 1.0,
        Loss.ABORT: 2.0,
        Loss.REGROUP: 4.0,
        Loss.RESTORE: 7.0,
        Loss.REPLAY: 16.0,  # 10 to 25 thrown away, 39 to 40 before the step
        Loss.MIRROR_STALL: 0.0,
        Loss.REWIND: 0.0,
        Loss.OTHER: 0.0,
    }


def test_a_recovery_may_be_recorded_after_further_steps() -> None:
    first, late = (GoodputAccount.from_dict(GoodputAccount(began_at=0.0).to_dict()) for _ in range(2))
    phases = split(5.0, 6.0, 7.0, 8.0, 9.0, 12.0)
    first.record_step(10.0, 11.0)
    first.record_recovery(phases)
    first.record_step(11.0, 12.0)
    late.record_step(10.0, 11.0)
    late.record_step(11.0, 12.0)
    late.record_recovery(phases)
    assert first.report(12.0) == late.report(12.0)


def test_the_goodput_of_no_time_is_zero() -> None:
    assert GoodputAccount(began_at=5.0).report(5.0).goodput == 0.0


def test_a_step_during_which_the_clock_was_set_back_counts_as_zero() -> None:
    account = GoodputAccount(began_at=0.0)
    account.record_step(10.0, 8.0, stall_s=1.0)
    assert account.productive_s == 0.0


@given(st.lists(st.tuples(spans, spans, spans, st.lists(spans, min_size=6, max_size=6) | st.none()), max_size=20))
def test_all_times_sum_to_the_wall_time(
    events: list[tuple[float, float, float, list[float] | None]],
) -> None:
    """A run of pauses and steps; some steps are discarded with the time before them, and replayed."""
    account, now, productive_s = GoodputAccount(began_at=0.0), 0.0, 0.0
    for pause_s, step_s, stall_s, outage in events:
        saved = json.loads(json.dumps(account.to_dict()))
        now += pause_s
        at = [now]
        if outage is not None:
            for span_s in outage[:-1]:
                at.append(at[-1] + span_s)
            now = at[4] + outage[-1]
            account = GoodputAccount.from_dict(saved)
        account.record_step(now, now + step_s, stall_s=min(stall_s, step_s))
        productive_s += step_s - min(stall_s, step_s)
        now += step_s
        if outage is not None:
            account.record_recovery(split(*at[:5], now))
    report = account.report(now)
    assert report.productive_s == pytest.approx(productive_s)
    assert fsum([report.productive_s, *report.lost.values()]) == pytest.approx(report.wall_s)
    assert all(lost_s >= -1e-6 for lost_s in report.lost.values())
    assert account.recoveries == sum(outage is not None for *_, outage in events)


def test_a_rewind_costs_the_steps_since_its_version_and_the_time_until_the_next_step() -> None:
    account = GoodputAccount(began_at=0.0)
    account.record_step(0.0, 10.0)
    then = account.productive_s
    account.record_step(10.0, 16.0, stall_s=1.0)
    account.rewind_to(then)
    account.record_step(18.5, 20.5)
    account.record_rewind()
    report = account.report(21.0)
    assert report.productive_s == 12.0
    assert {loss: lost_s for loss, lost_s in report.lost.items() if lost_s} == {
        Loss.MIRROR_STALL: 1.0,
        Loss.REWIND: 5.0 + 2.5,
        Loss.OTHER: 0.5,
    }
    assert report.productive_s + sum(report.lost.values()) == report.wall_s
