"""Which shards have all their copies, from an inventory of the arenas."""

from __future__ import annotations

from lightning_ckptless.protocol.redundancy import protection_of
from lightning_ckptless.protocol.versions import Replica, SlotState, Version

KEEPERS, NODES = ((1,), (0,), (3,), (2,)), ("a", "b", "c", "d")
PAIRS = [(shard, holder) for shard, (other,) in enumerate(KEEPERS) for holder in (shard, other)]


def replica(shard: int, holder: int, step: int = 6, slot: int = 0) -> Replica:
    version = Version(step, True)
    return Replica(shard, holder, NODES[holder], slot, version, 1, 4, "layout", SlotState.COMMITTED, 8, 8, "")


def test_all_copies_are_there() -> None:
    found = protection_of([replica(*pair) for pair in PAIRS], KEEPERS, NODES, since="step 2")
    assert (found.whole, found.absent) == (4, ())
    assert found.reason == "4 of 4 shards have all copies, since step 2"


def test_a_node_that_came_back_empty() -> None:
    found = protection_of([replica(*pair) for pair in PAIRS if pair[1] != 1], KEEPERS, NODES)
    assert found.whole == 2
    assert found.reason == ("2 of 4 shards have all copies of step 6; missing: shard 0 on rank 1, shard 1 on rank 1")


def test_a_version_in_flight_does_not_hide_the_one_before() -> None:
    inventory = [replica(*pair) for pair in PAIRS] + [replica(shard, shard, 7, 1) for shard in range(4)]
    assert protection_of(inventory, KEEPERS, NODES).whole == 4


def test_a_shard_without_any_copy() -> None:
    found = protection_of([replica(*pair) for pair in PAIRS if pair[0]], KEEPERS, NODES)
    assert (found.snapshot, found.whole) == (None, 0)
    assert found.reason == (
        "0 of 4 shards have all copies: no version is complete: shard 0 of 4 has no replica of step 6"
    )


def test_a_copy_on_another_node_than_its_holders_does_not_count() -> None:
    moved = ("b", "a", "c", "d")
    assert protection_of([replica(*pair) for pair in PAIRS], KEEPERS, moved).whole == 2
