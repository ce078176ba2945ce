"""Nodes are lost with their arenas, again before their copies are filled in: what is left is judged right."""

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
    """Let some events happen, then lose a domain or two."""
    for _ in islice(events, world.chance.randint(0, most)):
        pass
    names = sorted(set(world.domains))
    world.lose(world.chance.sample(names, world.chance.randint(1, 2)))


def judge(world: World) -> Complete | None:
    """What is found after a loss, compared with the second book; None where the run is over."""
    missing, found = world.should_be_missing, world.look()
    if world.committed is None:
        return found if isinstance(found, Complete) else None
    if not missing:
        assert isinstance(found, Complete), f"{world.committed} is whole, and {found.reason}"
        assert found.snapshot.version >= world.committed.version
        return found
    if isinstance(found, Complete):
        # The next version, of which all had been sealed when the votes were not yet cast.
        assert found.snapshot.version > world.committed.version
        return found
    assert isinstance(found, Missing)
    if found.since == world.committed.version:
        assert found.shards == missing
    return None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_loss_before_the_copies_are_filled_in(layout: str) -> None:
    ends = []
    for seed in range(SEEDS):
        world = World(seed, *LAYOUTS[layout])
        try:
            ends.append(play(world))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    # Both ends are seen, or nothing was shown.
    assert {"lost", "protected"} == set(ends)


def play(world: World) -> str:
    """One run: trained, lost, recovered, lost while it is protected, recovered again."""
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


class Hasty(World):
    """A world that trains on without filling in what is missing: what the simulation is there to find."""

    def protect(self, found: Complete) -> Iterator[None]:
        self._count(found.snapshot)
        yield


def test_going_on_unprotected_is_found_out() -> None:
    def loses(seed: int) -> bool:
        try:
            play(Hasty(seed, *LAYOUTS["four nodes"]))
        except AssertionError:
            return True
        return False

    assert any(loses(seed) for seed in range(SEEDS))


def test_while_copies_are_filled_in_status_says_which_are_missing() -> None:
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
