"""The vote at the end of a round."""

from __future__ import annotations

from functools import reduce
from operator import and_

from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.replica.mirror.coordinated_stop import StopPurpose
from lightning_ckptless.replica.mirror.round_vote import RoundVote

PURPOSES = st.none() | st.sampled_from(StopPurpose)
VOTES = st.builds(RoundVote, st.booleans(), PURPOSES, st.none() | st.integers(0, (1 << 10) - 1))


@given(VOTES)
def test_a_vote_survives_encoding(vote: RoundVote) -> None:
    assert RoundVote.decode(vote.encode()) == vote
    assert 0 <= vote.encode() < 1 << 31


@given(VOTES, st.lists(VOTES))
def test_the_outcome_is_what_all_ranks_accept(mine: RoundVote, others: list[RoundVote]) -> None:
    outcome = mine.combine(lambda bits: reduce(and_, (other.encode() for other in others), bits))
    everyone = [mine, *others]
    assert outcome.complete is all(vote.complete for vote in everyone)
    asked = {vote.stop for vote in everyone}
    first = (purpose for purpose in (StopPurpose.END, StopPurpose.HAND_OVER) if purpose in asked)
    assert outcome.stop is next(first, None)
    intervals = [vote.accepted_intervals for vote in everyone if vote.accepted_intervals is not None]
    expected = reduce(and_, intervals) if len(intervals) == len(everyone) else None
    assert outcome.accepted_intervals == expected
