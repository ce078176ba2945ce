"""Unequal numbers of steps are detected from the steps that ranks have begun."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_ckptless.protocol.hang_detection import Point, RankProgress
from lightning_ckptless.protocol.uneven_steps import AtEnd, WhyEnded, find_uneven, out_of_data

AHEAD = RankProgress(step=13, point=Point.BACKWARD, count=0, at=1.0, longest_pause_s=0.1, own_s=0.1, epoch=1)
DONE = replace(AHEAD, step=12, point=Point.COMMIT, out_of_data=True)
NO_DATA = AtEnd(12, WhyEnded.NO_DATA)


def test_a_rank_that_has_ended_before_another_one_is_named_with_its_last_step() -> None:
    assert find_uneven({1: NO_DATA}, {0: AHEAD, 1: DONE}) == (
        "rank 1 ran out of training data after step 12, rank 0 did not: give every rank the same number of batches "
        "(drop_last=True, or limit_train_batches=N)"
    )


def test_after_a_recovery_the_position_of_the_dataset_may_be_the_cause() -> None:
    found = find_uneven({1: NO_DATA}, {0: AHEAD}, has_recovered=True)
    assert found is not None
    assert found.endswith("does not restore its exact position")
    assert find_uneven({1: AtEnd(12, WhyEnded.ASKED)}, {0: AHEAD}, has_recovered=True) == find_uneven(
        {1: AtEnd(12, WhyEnded.ASKED)}, {0: AHEAD}
    )


def test_the_first_rank_to_end_and_all_ranks_ahead_are_named() -> None:
    found = find_uneven({1: NO_DATA, 3: AtEnd(13, WhyEnded.NO_DATA)}, {0: AHEAD, 2: AHEAD})
    assert found is not None
    assert found.startswith("rank 1 ran out of training data after step 12, ranks 0, 2 did not")


def test_at_most_eight_ranks_ahead_are_named() -> None:
    found = find_uneven({1: NO_DATA}, {rank: AHEAD for rank in range(100) if rank != 1})
    assert found is not None
    assert "ranks 0, 2, 3, 4, 5, 6, 7, 8 and 91 more did not" in found


def test_a_rank_that_stopped_alone_gets_advice_on_stopping_together() -> None:
    found = find_uneven({1: AtEnd(12, WhyEnded.ASKED)}, {0: AHEAD})
    assert found is not None
    assert "rank 1 stopped training (trainer.should_stop) after step 12" in found
    assert "reduce_boolean_decision" in found


@pytest.mark.parametrize(
    "other",
    [
        replace(AHEAD, step=12, point=Point.VALIDATION),
        replace(AHEAD, step=12, point=Point.COMMIT),
        replace(AHEAD, step=-1, point=Point.OUTSIDE),
        replace(AHEAD, step=12, point=Point.OPTIMIZER),
    ],
)
def test_ranks_that_may_still_end_with_the_same_step_are_not_blamed(other: RankProgress) -> None:
    assert find_uneven({1: NO_DATA}, {0: other}) is None


def test_no_rank_is_blamed_before_one_has_ended() -> None:
    assert find_uneven({}, {0: AHEAD, 1: DONE}) is None


def test_an_epoch_that_ends_on_one_rank_and_continues_on_another_is_detected() -> None:
    assert out_of_data({0: AHEAD, 1: DONE}) == {1: NO_DATA}


@pytest.mark.parametrize("other", [replace(AHEAD, epoch=2), replace(AHEAD, epoch=-1), DONE])
def test_a_rank_in_the_next_epoch_or_at_the_end_of_this_one_has_no_more_data(other: RankProgress) -> None:
    assert out_of_data({0: other, 1: DONE}) == {}
