"""A run may recover any number of times while it makes progress, and a few times without progress."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.retry_policy import HOUR_S, RecoveryHistory, RecoveryLimits, why_no_recovery

LIMITS = RecoveryLimits(without_progress=3, per_hour=5)


def test_a_long_run_is_not_limited_by_its_age() -> None:
    history = RecoveryHistory()
    for number in range(5000):
        at = number * HOUR_S / 4
        assert why_no_recovery(history, LIMITS, at) is None
        history = history.after_recovery(at).after_progress()
    assert history.count == 5000
    assert len(history.recent) <= LIMITS.per_hour


def test_recoveries_without_a_new_step_are_a_crash_loop() -> None:
    history = RecoveryHistory()
    for number in range(3):
        assert why_no_recovery(history, LIMITS, number * HOUR_S) is None
        history = history.after_recovery(number * HOUR_S)
    reason = why_no_recovery(history, LIMITS, 3 * HOUR_S)
    assert reason is not None
    assert "had 3 without a new committed step, and max_recoveries_without_progress=3 allows no more" in reason
    assert why_no_recovery(history.after_progress(), LIMITS, 3 * HOUR_S) is None


def test_too_many_recoveries_in_an_hour_end_a_run_despite_progress() -> None:
    history = RecoveryHistory()
    for number in range(5):
        assert why_no_recovery(history, LIMITS, 60.0 * number) is None
        history = history.after_recovery(60.0 * number).after_progress()
    reason = why_no_recovery(history, LIMITS, 300.0)
    assert reason is not None
    assert "had 5 within the last 300 s, and max_recoveries_per_hour=5 allows no more" in reason
    assert why_no_recovery(history, LIMITS, HOUR_S + 1) is None


def test_a_launcher_may_limit_the_total() -> None:
    history = RecoveryHistory().after_recovery(0.0).after_progress()
    assert why_no_recovery(history, RecoveryLimits(in_all=2), 1.0) is None
    reason = why_no_recovery(history, RecoveryLimits(in_all=1), 1.0)
    assert reason is not None and "the run had 1, and the launcher's --max-restarts allows no more" in reason
    assert why_no_recovery(RecoveryHistory(), RecoveryLimits(in_all=0), 0.0) is not None


@given(st.lists(st.tuples(st.floats(0.0, 4000.0), st.booleans()), max_size=40))
def test_a_run_that_may_recover_is_within_its_limits(steps: list[tuple[float, bool]]) -> None:
    history, now = RecoveryHistory(), 0.0
    for pause_s, progresses in steps:
        now += pause_s
        if why_no_recovery(history, LIMITS, now) is not None:
            break
        history = history.after_recovery(now)
        history = history.after_progress() if progresses else history
    assert history.without_progress <= LIMITS.without_progress
    assert len([at for at in history.recent if at > now - HOUR_S]) <= LIMITS.per_hour
