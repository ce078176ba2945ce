"""The choice of the version to restore: never a mixture of two."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.versions import (
    READABLE,
    Complete,
    Missing,
    Replica,
    SlotState,
    Version,
    newest_complete,
)

WORLD_SIZE = 3


def replica(
    shard: int, step: int, *, holder: int | None = None, generation: int = 1, state: SlotState = SlotState.COMMITTED
) -> Replica:
    holder = shard if holder is None else holder
    version = Version(step, True)
    return Replica(shard, holder, f"n{holder}", step % 2, version, generation, WORLD_SIZE, "layout", state, 8, 4, "")


replicas = st.builds(
    replica,
    shard=st.integers(0, WORLD_SIZE - 1),
    step=st.integers(1, 3),
    holder=st.integers(0, WORLD_SIZE - 1),
    generation=st.integers(1, 2),
    state=st.sampled_from(SlotState),
)


@given(st.lists(replicas, max_size=24), st.data())
def test_the_chosen_version_is_complete_unmixed_and_the_newest(inventory: list[Replica], data: st.DataObject) -> None:
    bad = data.draw(st.lists(st.sampled_from(inventory), max_size=4)) if inventory else []
    good = [r for r in inventory if r.state in READABLE and r not in bad]
    whole = {r.snapshot for r in good if {s.shard for s in good if s.snapshot == r.snapshot} == set(range(WORLD_SIZE))}
    found = newest_complete(inventory, bad=bad)
    if isinstance(found, Missing):
        assert not whole
        return
    assert found.snapshot == max(whole)
    for shard, kept in enumerate(found.replicas):
        assert kept
        assert all(r.shard == shard and r.snapshot == found.snapshot and r in good for r in kept)


@given(st.lists(replicas, max_size=12, unique_by=lambda r: (r.shard, r.holder, r.slot)), st.data())
def test_the_order_of_the_inventory_does_not_matter(inventory: list[Replica], data: st.DataObject) -> None:
    assert newest_complete(data.draw(st.permutations(inventory))) == newest_complete(inventory)


def test_an_older_complete_version_is_preferred_to_a_newer_incomplete_one() -> None:
    found = newest_complete([*whole(5), replica(0, 6), replica(1, 6)])
    assert isinstance(found, Complete)
    assert found.snapshot.version == Version(5, True)
    assert found.reason == "step 5 of generation 1 is complete: 3 of 3 shards, at least 1 replica each"


def test_replicas_of_different_generations_are_not_combined() -> None:
    mixture = [replica(0, 5), replica(1, 5), replica(2, 5, generation=2)]
    assert newest_complete(mixture) == Missing(
        (0, 1), Version(5, True), "no version is complete: shards 0, 1 of 3 have no replica of step 5"
    )


def test_the_writers_own_copy_comes_first() -> None:
    found = newest_complete([replica(0, 5, holder=2), *whole(5)])
    assert isinstance(found, Complete)
    assert [r.holder for r in found.replicas[0]] == [0, 2]


def test_damaged_replicas_are_counted() -> None:
    damaged = replica(1, 5)
    assert newest_complete([replica(0, 5), damaged, replica(2, 5)], bad=[damaged]).reason == (
        "no version is complete: shard 1 of 3 has no replica of step 5 (1 damaged replica ignored)"
    )


def test_empty_arenas() -> None:
    assert newest_complete([]) == Missing((), None, "the arenas are empty")


def test_a_version_before_validation_is_older_than_after_it() -> None:
    assert Version(4, True) < Version(5, False) < Version(5, True)
    assert str(Version(5, False)) == "step 5 (before validation)"


def whole(step: int) -> Sequence[Replica]:
    return [replica(shard, step) for shard in range(WORLD_SIZE)]
