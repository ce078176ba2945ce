"""Nodes that are left alone by the one that hosted them all come to the same next place."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.rendezvous_failover import choose_place

PLACES = ("a:1", "b:1", "c:1")


def test_the_first_place_is_hosted_by_its_own_node_alone() -> None:
    found = [choose_place(PLACES, own=own, answering=(), lost=None) for own in (0, 1, 2, None)]
    assert [(place.endpoint, place.hosts) for place in found] == [
        ("a:1", True), ("a:1", False), ("a:1", False), ("a:1", False)
    ]  # fmt: skip


def test_when_it_is_lost_the_next_in_order_hosts() -> None:
    found = [choose_place(PLACES, own=own, answering=(), lost=0) for own in (1, 2)]
    assert [(place.endpoint, place.hosts) for place in found] == [("b:1", True), ("b:1", False)]
    assert "a:1 was lost" in found[0].reason


def test_a_node_that_comes_back_goes_to_the_place_that_answers() -> None:
    place = choose_place(PLACES, own=0, answering=(1,), lost=None)
    assert (place.endpoint, place.hosts) == ("b:1", False)


def test_after_the_last_place_comes_the_first() -> None:
    assert choose_place(PLACES, own=0, answering=(), lost=2).hosts


@given(st.integers(1, 6), st.data())
def test_all_that_are_left_choose_the_same_and_one_at_most_hosts(count: int, data: st.DataObject) -> None:
    places = [f"{index}:1" for index in range(count)]
    lost = data.draw(st.none() | st.integers(0, count - 1))
    nodes = [own for own in range(count) if own != lost]
    found = [choose_place(places, own=own, answering=(), lost=lost) for own in nodes]
    assert len({place.endpoint for place in found}) <= 1
    assert sum(place.hosts for place in found) <= 1
    if lost is None:
        assert sum(place.hosts for place in found) == 1
