"""Which rank is a straggler, and whether its process is replaced."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.stragglers import (
    DRAIN_EVERY_S,
    Straggler,
    StragglerAction,
    StragglerOptions,
    find_straggler,
    plan_straggler,
)

SLOW = Straggler(2, 0.19, 0.1)
ASKED = StragglerOptions(drain_after_s=60.0)
NOW: dict[str, Any] = {"since_s": 61.0, "drained_s": None, "is_draining": False}


def test_a_straggler_is_named() -> None:
    found = find_straggler({0: 0.1, 1: 0.1, 2: 0.19})
    assert found == SLOW
    assert str(found) == "takes 190.0 ms per step, 1.9x the median of the others"
    assert find_straggler({0: 0.1, 1: 0.1, 2: 0.12}) is None
    assert find_straggler({0: 0.1}) is None
    assert find_straggler({0: 0.0, 1: 0.5}) is None


def test_the_factor_is_the_users() -> None:
    assert find_straggler({0: 0.1, 1: 0.1, 2: 0.19}, factor=2.0) is None
    assert find_straggler({0: 0.1, 1: 0.1, 2: 0.12}, factor=1.1) is not None


def test_short_steps_differ_by_noise() -> None:
    assert find_straggler({0: 0.001, 1: 0.009}) is None


@pytest.mark.parametrize(
    ("options", "now", "action", "words"),
    [
        (StragglerOptions(), {}, StragglerAction.REPORT, "drain_stragglers_after_s is not set"),
        (ASKED, {"since_s": 59.0}, StragglerAction.WAIT, "for 59.0 s; another process takes the rank after 60 s"),
        (ASKED, {"is_draining": True}, StragglerAction.WAIT, "a rank of its node is being drained"),
        (ASKED, {"drained_s": 3599.0}, StragglerAction.WAIT, "was drained 3599 s ago, which is done once an hour"),
        (ASKED, {"drained_s": 3600.0}, StragglerAction.DRAIN, "straggler: rank 2 takes 190.0 ms per step"),
        (ASKED, {}, StragglerAction.DRAIN, "1.9x the median of the others for 61.0 s"),
    ],
)
def test_what_follows(options: StragglerOptions, now: dict[str, Any], action: StragglerAction, words: str) -> None:
    plan = plan_straggler(SLOW, options, **(NOW | now))
    assert (plan.rank, plan.action) == (2, action)
    assert words in plan.reason


@given(st.floats(0, 1e5), st.none() | st.floats(0, 1e5), st.booleans())
def test_a_straggler_is_drained_once_an_hour_at_most(
    since_s: float, drained_s: float | None, is_draining: bool
) -> None:
    plan = plan_straggler(SLOW, ASKED, since_s=since_s, drained_s=drained_s, is_draining=is_draining)
    may_be = since_s >= 60.0 and not is_draining and (drained_s is None or drained_s >= DRAIN_EVERY_S)
    assert (plan.action is StragglerAction.DRAIN) == may_be


@given(st.dictionaries(st.integers(0, 9), st.floats(0, 10), max_size=9))
def test_a_straggler_is_the_slowest(own_s: dict[int, float]) -> None:
    found = find_straggler(own_s)
    assert found is None or found.own_s == max(own_s.values()) >= 1.5 * found.others_s
