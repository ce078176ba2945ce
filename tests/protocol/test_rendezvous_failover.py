"""All remaining nodes choose the same next rendezvous endpoint."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.rendezvous_failover import choose_endpoint

PLACES = ("a:1", "b:1", "c:1")


def test_the_first_endpoint_is_hosted_by_its_own_node_only() -> None:
    found = [choose_endpoint(PLACES, own=own, answering=(), lost=None) for own in (0, 1, 2, None)]
    assert [(place.endpoint, place.hosts) for place in found] == [
        ("a:1", True), ("a:1", False), ("a:1", False), ("a:1", False)
    ]  # fmt: skip


def test_after_a_loss_the_next_endpoint_in_order_is_used() -> None:
    found = [choose_endpoint(PLACES, own=own, answering=(), lost=0) for own in (1, 2)]
    assert [(place.endpoint, place.hosts) for place in found] == [("b:1", True), ("b:1", False)]
    assert "a:1 was lost" in found[0].reason


def test_a_restarted_node_uses_the_endpoint_that_answers() -> None:
    place = choose_endpoint(PLACES, own=0, answering=(1,), lost=None)
    assert (place.endpoint, place.hosts) == ("b:1", False)


def test_the_first_endpoint_follows_the_last() -> None:
    assert choose_endpoint(PLACES, own=0, answering=(), lost=2).hosts


@given(st.integers(1, 6), st.data())
def test_all_remaining_nodes_choose_the_same_endpoint_and_at_most_one_hosts_it(count: int, data: st.DataObject) -> None:
    places = [f"{index}:1" for index in range(count)]
    lost = data.draw(st.none() | st.integers(0, count - 1))
    nodes = [own for own in range(count) if own != lost]
    found = [choose_endpoint(places, own=own, answering=(), lost=lost) for own in nodes]
    assert len({place.endpoint for place in found}) <= 1
    assert sum(place.hosts for place in found) <= 1
    if lost is None:
        assert sum(place.hosts for place in found) == 1
