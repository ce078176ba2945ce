"""Which shards have all their copies, and which losses these survive, from an inventory of the arenas."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.redundancy import cover_of, protection_of
from lightning_ckptless.protocol.versions import Complete, Replica, SlotState, Version, newest_complete

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


@st.composite
def inventories(draw: st.DrawFn) -> tuple[list[Replica], list[str]]:
    """Copies of up to four shards on any holders, and the failure domain of each rank."""
    count = draw(st.integers(1, 4))
    held = draw(st.lists(st.sets(st.integers(0, count - 1), min_size=1), min_size=count, max_size=count))
    domains = draw(st.lists(st.sampled_from(["x", "y", "z"]), min_size=count, max_size=count))
    copies = [
        Replica(shard, holder, NODES[holder], 0, Version(6, True), 1, count, "", SlotState.COMMITTED, 8, 8, "")
        for shard, holders in enumerate(held)
        for holder in holders
    ]
    return copies, domains


@given(inventories())
def test_the_losses_that_are_survived_are_those_of_which_any_may_happen(made: tuple[list[Replica], list[str]]) -> None:
    copies, domains = made
    cover = cover_of(copies, domains, NODES[: len(domains)])
    assert cover is not None

    def survives(lost: Collection[str]) -> bool:
        kept = [one for one in copies if domains[one.holder] not in lost]
        return isinstance(newest_complete(kept), Complete)

    assert all(survives(lost) for lost in combinations(set(domains), cover.losses))
    assert cover.fatal
    assert not any(survives(lost) for lost in cover.fatal)
    assert all(len(lost) == cover.losses + 1 for lost in cover.fatal)


def test_a_version_with_copies_is_preferred_to_a_newer_one_without() -> None:
    inventory = [replica(*pair) for pair in PAIRS] + [replica(shard, shard, 7, 1) for shard in range(4)]
    cover = cover_of(inventory, NODES, NODES)
    assert cover is not None
    assert (cover.snapshot.version.optimizer_step, cover.losses) == (6, 1)
    newest = cover_of([*inventory, *(replica(shard, holder, 7, 0) for shard, holder in PAIRS)], NODES, NODES)
    assert newest is not None
    assert (newest.snapshot.version.optimizer_step, newest.losses) == (7, 1)


def test_nothing_covers_a_version_that_is_not_complete() -> None:
    assert cover_of([replica(0, 0)], NODES, NODES) is None
