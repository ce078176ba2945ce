"""A program that ends by itself again and again, with no step in between, is not started for ever."""

from __future__ import annotations

from lightning_ckptless.membership.futility import Futility
from lightning_ckptless.membership.parent import End

EXITED, KILLED = End(3, 0.0), End(-9, 0.0)


def test_three_starts_without_a_step_are_enough() -> None:
    futility = Futility()
    verdicts = [futility.judge(1, EXITED, has_begun=False) for _ in range(3)]
    assert verdicts[:2] == [None, None]
    assert verdicts[2] is not None and verdicts[2].final and verdicts[2].rank == 1
    assert "3 starts in a row ended with exit code 3" in verdicts[2].reason


def test_a_step_a_signal_or_an_unknown_end_in_between_begins_the_count_again() -> None:
    for end, has_begun in ((EXITED, True), (KILLED, False), (None, False)):
        futility = Futility()
        for _ in range(2):
            futility.judge(0, EXITED, has_begun=False)
        assert futility.judge(0, end, has_begun=has_begun) is None
        assert [futility.judge(0, EXITED, has_begun=False) for _ in range(2)] == [None, None]
