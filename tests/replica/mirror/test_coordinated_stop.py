"""All ranks end at one moment, wherever each of them is when the end is asked for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ckptless.errors import TransportError
from lightning_ckptless.replica.mirror.coordinated_stop import Ending
from lightning_ckptless.replica.transport import LoopbackTransport


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_all_end_at_the_first_moment_that_none_has_passed(passed: list[int]) -> None:
    world = LoopbackTransport.world(len(passed))
    endings = [Ending() for _ in passed]
    for ending, count in zip(endings, passed, strict=True):
        assert not any(ending.passes() for _ in range(count))
    with ThreadPoolExecutor(2 * len(passed)) as pool:
        # The mirrors meet, while those that train go on.
        met = [pool.submit(ending.agree, peer.gather) for ending, peer in zip(endings, world, strict=True)]
        for future in met:
            future.result()
        further = list(pool.map(lambda ending: next(n for n in range(1, 9) if ending.passes()), endings))
    assert {before + more for before, more in zip(passed, further, strict=True)} == {max(passed) + 1}


def test_who_trains_waits_until_the_ranks_have_met() -> None:
    ending, (mine, other) = Ending(), LoopbackTransport.world(2)
    with ThreadPoolExecutor(2) as pool:
        meeting = pool.submit(ending.agree, mine.gather)
        while not ending.is_agreed:
            pass
        passing = pool.submit(ending.passes)
        with pytest.raises(TimeoutError):
            passing.result(0.05)
        # The other one is a moment further: this one has one more before it.
        other.gather(b"1")
        meeting.result()
        assert not passing.result()
        assert ending.passes()


def test_a_peer_that_is_lost_meanwhile_is_told_to_both() -> None:
    ending, (mine, other) = Ending(), LoopbackTransport.world(2)
    other.close()
    with pytest.raises(TransportError):
        ending.agree(mine.gather)
    with pytest.raises(TransportError):
        ending.passes()
