"""The history of versions in the slots, and the way back to one of them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest

from lightning_ckptless.errors import TransportError
from lightning_ckptless.protocol.versions import Complete, Version, newest_complete
from lightning_ckptless.replica.mirror.round_vote import RoundVote
from tests.replica.world import MakeWorld, StopError, World


def write(ranks: World, steps: Iterable[int]) -> None:
    for step in steps:
        ranks.submit(step)
        assert ranks.settle() == [Version(step, True)] * ranks.size


def complete(ranks: World) -> list[int]:
    """The steps of which every shard has a replica."""
    inventory = [replica for arena in ranks.arenas for replica in arena.inventory()]
    steps = sorted({replica.version.optimizer_step for replica in inventory})
    found = (newest_complete(r for r in inventory if r.version == Version(step, True)) for step in steps)
    return [one.snapshot.version.optimizer_step for one in found if isinstance(one, Complete)]


def go_back(ranks: World, step: int, value: float) -> None:
    def one(rank: int) -> None:
        blob = f"blob {rank} {step}".encode()
        ranks.mirrors[rank].go_back(Version(step, True), ranks.tensors(value), blob)

    with ThreadPoolExecutor(ranks.size) as threads:
        list(threads.map(one, range(ranks.size)))


def test_the_slots_hold_the_history(world: MakeWorld) -> None:
    ranks = world(2).begin(slots=5, history_every=4)
    write(ranks, range(1, 15))
    assert complete(ranks) == [1, 5, 9, 13, 14]
    ranks.begin(committed=Version(14, True), slots=5, history_every=4)
    write(ranks, range(15, 20))
    assert complete(ranks) == [9, 13, 17, 18, 19], "a new generation continues the history"
    assert ranks.newest(without=[0]) == 19


def test_a_shorter_history_removes_the_slots_that_it_does_not_use(world: MakeWorld) -> None:
    ranks = world(2).begin(slots=6)
    write(ranks, range(1, 9))
    ranks.begin(committed=Version(8, True), slots=3)
    write(ranks, range(9, 12))
    assert complete(ranks) == [9, 10, 11]
    assert len(list(ranks.arenas[0].path.glob("shard-*"))) == 2 * 3


def test_going_back_leaves_no_version_of_the_abandoned_branch(world: MakeWorld) -> None:
    ranks = world(2).begin(slots=6)
    write(ranks, range(1, 9))
    ranks.begin(committed=Version(8, True), slots=6)
    go_back(ranks, 5, value=55.0)
    assert complete(ranks) == [4, 5] and ranks.values() == {55.0}
    write(ranks, range(6, 9))
    assert complete(ranks) == [4, 5, 6, 7, 8]
    assert ranks.newest(without=[1]) == 8


@pytest.mark.parametrize("stopped_at", [1, 2, *(pytest.param(count, marks=pytest.mark.long) for count in (3, 4))])
def test_a_fault_on_the_way_back_leaves_the_newest_version_or_the_target(world: MakeWorld, stopped_at: int) -> None:
    ranks = world(2).begin(slots=6)
    write(ranks, range(1, 9))
    seen: list[int] = []

    def stop(moment: str, version: Version) -> None:
        if moment == "go_back":
            seen.append(1)
            if len(seen) >= stopped_at:
                raise StopError

    # Two ranks with two rings each: one after the other stops before it has discarded anything more.
    ranks.begin(committed=Version(8, True), slots=6, probes=dict.fromkeys(range(2), stop))
    with pytest.raises((StopError, TransportError)):
        go_back(ranks, 5, value=55.0)
    assert ranks.newest() in (8, 5)
    assert ranks.values() == {8.0 if ranks.newest() == 8 else 55.0}


def test_each_ring_discards_the_newest_version_last(world: MakeWorld) -> None:
    ranks = world(2).begin(slots=6)
    write(ranks, range(1, 9))
    ranks.begin(committed=Version(8, True), slots=6)
    found: list[list[int]] = []
    ring = ranks.mirrors[0]._rings[1]
    for slot in ring._slots:
        discard = slot.discard

        def noted(discard: object = discard) -> None:
            assert callable(discard)
            discard()
            held = [each.view.snapshot for each in ring._slots]
            found.append([snapshot.version.optimizer_step for snapshot in held if snapshot is not None])

        slot.discard = noted  # type: ignore[method-assign]
    go_back(ranks, 5, value=55.0)
    assert found and all(8 in steps for steps in found[:-1]) and 8 not in found[-1]


def test_a_rank_without_its_copies_stops_the_way_back(world: MakeWorld) -> None:
    ranks = world(2).begin(slots=4)
    write(ranks, range(1, 5))
    ranks.begin(committed=Version(4, True), slots=4)
    ranks.mirrors[1]._vote = lambda _: RoundVote(False)
    with pytest.raises(TransportError, match="step 3, to which all ranks go back, could not be mirrored"):
        go_back(ranks, 3, value=3.5)
    assert ranks.newest() == 4
