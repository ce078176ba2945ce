"""Runs scenarios over ranges of seeds; the first violated invariant is raised with the seed and what has happened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from tests.simulation.invariants import INVARIANTS
from tests.simulation.tasks import Carriers
from tests.simulation.world import Scenario, World

SCENARIOS: Mapping[str, Scenario] = MappingProxyType(
    {
        "one death": Scenario(nodes=(2,), deaths=1),
        "one death of three": Scenario(nodes=(3,), deaths=1),
        "two nodes": Scenario(nodes=(1, 1), deaths=2),
        "death in a recovery": Scenario(nodes=(2,), deaths=1, deaths_at_moments=1),
        "deaths in recoveries": Scenario(nodes=(1, 2), deaths=1, deaths_at_moments=2),
        "many deaths": Scenario(nodes=(2, 1), deaths=5, deaths_at_moments=1),
        "a node joins": Scenario(nodes=(1, 1), joins=(1,), deaths=1, deaths_at_moments=1),
        "nodes join one node": Scenario(nodes=(2,), joins=(1, 1), deaths_at_moments=1),
        "a node is lost": Scenario(nodes=(1, 1, 1), losses=1, deaths=1),
        "a node replaces another": Scenario(nodes=(2, 1), joins=(1,), losses=1),
        "a partition": Scenario(nodes=(1, 1), partitions=1, deaths=1),
    }
)


def run(scenario: Scenario, seed: int, carriers: Carriers, world_class: type[World] = World) -> World:
    """Run one seed, and check the invariants.

    Args:
        scenario: what happens.
        seed: of all delays and faults.
        carriers: threads for the workers.
        world_class: the simulation.

    Raises:
        AssertionError: an invariant is violated, or the code under test raises an unexpected error; the message names
            the seed, and shows what has happened.
    """
    world = world_class(scenario, seed, carriers)
    try:
        world.run()
        for holds in INVARIANTS:
            holds(world)
    except Exception as error:
        # Whatever the code of a real run raises, the seed reproduces it.
        what = str(error) if isinstance(error, AssertionError) else repr(error)
        raise AssertionError("\n".join([f"--seed {seed}: {what}", *world.events_log])) from error
    return world


def explore(
    scenario: Scenario, seeds: Iterable[int], carriers: Carriers, world_class: type[World] = World
) -> list[World]:
    """Run seeds until one violates an invariant.

    Raises:
        AssertionError: see `run`.
    """
    return [run(scenario, seed, carriers, world_class) for seed in seeds]


def failing_seeds(
    scenario: Scenario, seeds: Iterable[int], carriers: Carriers, world_class: type[World] = World
) -> dict[int, str]:
    """Run all seeds; returns those that violate an invariant, and which."""
    failing = {}
    for seed in seeds:
        try:
            run(scenario, seed, carriers, world_class)
        except AssertionError as error:
            failing[seed] = str(error)
    return failing
