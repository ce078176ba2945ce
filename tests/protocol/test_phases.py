"""The phases of a recovery, from lists of instants instead of a clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.phases import Phases, phases_from

NAMES = ("fault_at", "detected_at", "stopped_at", "regrouped_at", "restored_at", "first_step_done_at")
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
