"""All ranks stop at the same point, wherever they are when one is asked to stop."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ckptless.errors import TransportError
from lightning_ckptless.replica.mirror.coordinated_stop import CoordinatedStop, StopPurpose
from lightning_ckptless.replica.transport import LoopbackTransport


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_all_ranks_stop_at_the_first_point_that_none_has_passed(passed: list[int]) -> None:
    world = LoopbackTransport.world(len(passed))
    stops = [CoordinatedStop() for _ in passed]
    for stop, count in zip(stops, passed, strict=True):
        assert not any(stop.passes() for _ in range(count))
    with ThreadPoolExecutor(2 * len(passed)) as pool:
        # The mirror threads agree while the training threads continue.
        met = [pool.submit(stop.agree, peer.gather, StopPurpose.END) for stop, peer in zip(stops, world, strict=True)]
        for future in met:
            future.result()
        further = list(pool.map(lambda stop: next(n for n in range(1, 9) if stop.passes()), stops))
    assert {before + more for before, more in zip(passed, further, strict=True)} == {max(passed) + 1}


def test_the_training_thread_waits_for_the_agreement() -> None:
    stop, (mine, other) = CoordinatedStop(), LoopbackTransport.world(2)
    with ThreadPoolExecutor(2) as pool:
        meeting = pool.submit(stop.agree, mine.gather, StopPurpose.END)
        while not stop.is_agreed:
            pass
        passing = pool.submit(stop.passes)
        with pytest.raises(TimeoutError):
            passing.result(0.05)
        # The other rank is one point ahead, so this one passes one more.
        other.gather(b"1")
        meeting.result()
        assert not passing.result()
        assert stop.passes()


def test_the_loss_of_a_peer_is_raised_in_both_threads() -> None:
    stop, (mine, other) = CoordinatedStop(), LoopbackTransport.world(2)
    other.close()
    with pytest.raises(TransportError):
        stop.agree(mine.gather, StopPurpose.END)
    with pytest.raises(TransportError):
        stop.passes()
