"""Deaths of any process at any moment: the run finishes with all ranks, and no committed version is lost.

Run a failing seed alone with `--simulation-seed N`, which prints its event log.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lightning_ckptless.errors import ProtocolError
from lightning_ckptless.protocol.recovery import WorkerState
from lightning_ckptless.protocol.slots import SlotView
from tests.protocol.recovery_world import Process, World

SEEDS = 100


@dataclass
class Watched(World):
    """A world that checks every restore."""

    def restored(self, process: Process, meeting: tuple[int, int], found: object) -> None:
        version = getattr(getattr(found, "snapshot", None), "version", None)
        step = version.optimizer_step if version is not None else 0
        assert step >= self.newest_committed, f"step {self.newest_committed} was committed, but step {step} is restored"
        super().restored(process, meeting, found)  # type: ignore[arg-type]


LAYOUTS = {"one node": (0, 0, 0), "two nodes": (0, 0, 1, 1), "a node each": (0, 1, 2)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("deaths", [1, 2, 6])
def test_deaths_at_any_moment(layout: str, deaths: int, request: pytest.FixtureRequest) -> None:
    asked = request.config.getoption("--simulation-seed")
    for seed in range(SEEDS) if asked is None else [asked]:
        world = Watched(seed, LAYOUTS[layout], steps=12, deaths=deaths)
        try:
            world.run()
            _assert_finished(world)
        except (AssertionError, ProtocolError) as error:
            raise AssertionError(f"--simulation-seed {seed}: {error}\n" + "\n".join(world.events_log)) from error
        if asked is not None:
            print("\n".join(world.events_log))


def _assert_finished(world: World) -> None:
    ranks = world.ranks()
    assert [process.rank for process in ranks] == list(range(world.world_size))
    codes = [None if process.end is None else process.end.exit_code for process in ranks]
    assert set(codes) == {0}, f"exit codes of the ranks: {codes}"
    assert {process.step for process in ranks} == {world.steps}, [process.step for process in ranks]
    assert {process.state for process in ranks} == {WorkerState.OUTSIDE}
    assert all(node.is_over for node in world.agents), "an agent does not end"


def test_most_recoveries_are_in_place() -> None:
    worlds = [World(seed, (0, 0, 0), steps=12, deaths=2) for seed in range(60)]
    for world in worlds:
        world.run()
    in_place, relaunches = (sum(world.count(event) for world in worlds) for event in ("in_place", "relaunch"))
    assert in_place > 4 * relaunches


@dataclass
class DiesInRestores(World):
    """A world in which rank 1 dies whenever it restores after a fault."""

    def restored(self, process: Process, meeting: tuple[int, int], found: object) -> None:
        if process.rank == 1 and meeting[1]:
            self.die(process)
        super().restored(process, meeting, found)  # type: ignore[arg-type]


def test_repeated_faults_during_recovery_lead_to_a_relaunch() -> None:
    world = DiesInRestores(1, (0, 0), steps=6, deaths=0)
    world.later(6.0, lambda: world.die(world.ranks()[1]))
    world.run()
    recoveries = [(event, details) for event, details in world.recorded if event in ("in_place", "relaunch")]
    assert [event for event, _ in recoveries] == ["in_place", "in_place", "relaunch"]
    assert "tried 2 times" in recoveries[-1][1]["reason"]
    _assert_finished(world)


class AlwaysFirstSlot(Watched):
    """A world that always overwrites the first slot, which the simulation must detect."""

    def slot_for(self, process: Process, views: tuple[SlotView, SlotView]) -> int:
        return 0


def test_a_weaker_rule_is_detected() -> None:
    def loses(seed: int) -> bool:
        try:
            AlwaysFirstSlot(seed, (0, 0, 0), steps=12, deaths=2).run()
        except AssertionError as error:
            return "was committed" in str(error)
        return False

    assert any(loses(seed) for seed in range(SEEDS))


def test_a_seed_is_reproducible() -> None:
    logs = []
    for _ in range(2):
        world = World(7, (0, 0, 1), steps=10, deaths=4)
        world.run()
        logs.append(world.events_log)
    assert logs[0] == logs[1]
    assert logs[0]
