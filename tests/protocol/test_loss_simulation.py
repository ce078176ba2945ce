"""Nodes are lost with their arenas, also while copies are filled in: the restored version is correct."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest

from lightning_ckptless.protocol.redundancy import protection_of
from lightning_ckptless.protocol.versions import Complete, Missing
from tests.protocol.loss_world import World

SEEDS = 120
LAYOUTS = {
    "four nodes": (("a", "b", "c", "d"), 1),
    "five nodes": (("a", "b", "c", "d", "e"), 1),
    "two racks of two": (("r", "r", "s", "s"), 1),
    "racks of unequal size": (("r", "r", "r", "s", "t"), 2),
}


def play_until_lost(world: World, events: Iterator[None], *, most: int) -> None:
    """Run some events, then lose one or two domains."""
    for _ in islice(events, world.chance.randint(0, most)):
        pass
    names = sorted(set(world.domains))
    world.lose(world.chance.sample(names, world.chance.randint(1, 2)))


def judge(world: World) -> Complete | None:
    """The version found after a loss, checked against independent bookkeeping; None if the run is lost."""
    missing, found = world.should_be_missing, world.look()
    if world.committed is None:
        return found if isinstance(found, Complete) else None
    if not missing:
        assert isinstance(found, Complete), f"{world.committed} is complete, but {found.reason}"
        assert found.snapshot.version >= world.committed.version
        return found
    if isinstance(found, Complete):
        # The next version: all copies were sealed, but not all votes cast.
        assert found.snapshot.version > world.committed.version
        return found
    assert isinstance(found, Missing)
    if found.since == world.committed.version:
        assert found.shards == missing
    return None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_loss_while_copies_are_filled_in(layout: str) -> None:
    ends = []
    for seed in range(SEEDS):
        world = World(seed, *LAYOUTS[layout])
        try:
            ends.append(play(world))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    # Both outcomes must occur, otherwise the test shows nothing.
    assert {"lost", "protected"} == set(ends)


def play(world: World) -> str:
    """A run that trains, loses nodes, recovers, loses nodes while copies are filled in, and recovers again."""
    play_until_lost(world, world.train(), most=60)
    for _ in range(3):
        found = judge(world)
        if found is None:
            return "lost"
        play_until_lost(world, world.protect(found), most=12)
    if (found := judge(world)) is None:
        return "lost"
    for _ in world.protect(found):
        pass
    protected = protection_of(world.inventory(), world.placement.holders, world.names)
    assert protected.absent == (), protected.reason
    # Fully protected again, any one loss is harmless.
    world.lose([world.chance.choice(world.domains)])
    assert judge(world) is not None
    return "protected"


class WithoutRereplication(World):
    """A world that does not fill in missing copies, which the simulation must detect."""

    def protect(self, found: Complete) -> Iterator[None]:
        self._count(found.snapshot)
        yield


def test_continuing_without_rereplication_is_detected() -> None:
    def loses(seed: int) -> bool:
        try:
            play(WithoutRereplication(seed, *LAYOUTS["four nodes"]))
        except AssertionError:
            return True
        return False

    assert any(loses(seed) for seed in range(SEEDS))


def test_the_number_of_complete_shards_grows_while_copies_are_filled_in() -> None:
    world = World(1, ("a", "b", "c", "d"), 1)
    for _ in islice(world.train(), 200):
        pass
    world.lose(["b"])
    found = judge(world)
    assert found is not None
    counts = [
        protection_of(world.inventory(), world.placement.holders, world.names).whole for _ in world.protect(found)
    ]
    assert counts[0] == 2 and counts[-1] == 4 and counts == sorted(counts)
