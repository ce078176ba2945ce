"""Whatever dies, and whenever: the run comes to its end, nothing that was committed is lost, and nobody is left behind.

A seed that fails is run alone with `--simulation-seed N`, and its story is printed.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lightning_ckptless.protocol.recovery import Rung, WorkerState
from lightning_ckptless.protocol.slots import SlotView
from tests.protocol.recovery_world import Process, World

SEEDS = 150


@dataclass
class Watched(World):
    """A world in which every restore is looked at."""

    def restored(self, process: Process, meeting: tuple[int, int], found: object) -> None:
        version = getattr(getattr(found, "snapshot", None), "version", None)
        step = version.optimizer_step if version is not None else 0
        assert step >= self.newest_committed, f"step {self.newest_committed} was committed, {step} is restored"
        super().restored(process, meeting, found)  # type: ignore[arg-type]


LAYOUTS = {"one node": (0, 0, 0), "two nodes": (0, 0, 1, 1), "a node each": (0, 1, 2)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("deaths", [1, 2, 6])
def test_any_death_at_any_moment(layout: str, deaths: int, request: pytest.FixtureRequest) -> None:
    asked = request.config.getoption("--simulation-seed")
    for seed in range(SEEDS) if asked is None else [asked]:
        world = Watched(seed, LAYOUTS[layout], steps=12, deaths=deaths)
        try:
            world.run()
            _assert_ended_well(world)
        except AssertionError as error:
            raise AssertionError(f"--simulation-seed {seed}: {error}\n" + "\n".join(world.story)) from error
        if asked is not None:
            print("\n".join(world.story))


def _assert_ended_well(world: World) -> None:
    ranks = world.ranks()
    assert [process.rank for process in ranks] == list(range(world.world_size))
    living = [process for process in ranks if process.alive]
    assert len(living) == world.world_size, f"{len(living)} of {world.world_size} ranks live at the end"
    assert {process.step for process in living} == {world.steps}, [process.step for process in living]
    assert {process.state for process in living} == {WorkerState.OUTSIDE}


def test_most_recoveries_are_in_place() -> None:
    worlds = [World(seed, (0, 0, 0), steps=12, deaths=2) for seed in range(60)]
    for world in worlds:
        world.run()
    assert sum(world.in_place for world in worlds) > 4 * sum(world.relaunches for world in worlds)


def test_a_recovery_that_is_hit_again_and_again_ends_in_a_relaunch() -> None:
    world = World(1, (0, 0), steps=6, deaths=0)
    regroup = world.regroup

    def hit(gone: list[Process]) -> None:
        regroup(gone)
        world.die(world.ranks()[gone[0].rank])

    world.regroup = hit  # type: ignore[method-assign]
    world.later(6.0, lambda: world.die(world.ranks()[1]))
    world.run()
    assert [plan.rung for plan in world.plans] == [Rung.IN_PLACE, Rung.IN_PLACE, Rung.RELAUNCH]
    assert "tried 2 times" in world.plans[-1].reason
    _assert_ended_well(world)


class Careless(Watched):
    """A world that overwrites whatever slot comes first: what the simulation is there to find."""

    def slot_for(self, process: Process, views: tuple[SlotView, SlotView]) -> int:
        return 0


def test_a_weaker_rule_is_found_out() -> None:
    def loses(seed: int) -> bool:
        try:
            Careless(seed, (0, 0, 0), steps=12, deaths=2).run()
        except AssertionError as error:
            return "was committed" in str(error)
        return False

    assert any(loses(seed) for seed in range(SEEDS))


def test_a_seed_tells_the_same_story_twice() -> None:
    stories = []
    for _ in range(2):
        world = World(7, (0, 0, 1), steps=10, deaths=4)
        world.run()
        stories.append(world.story)
    assert stories[0] == stories[1]
    assert stories[0]
