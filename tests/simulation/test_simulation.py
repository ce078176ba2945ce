"""Faults at any moment: the run finishes with all ranks in one state, and no committed version is lost.

Run a failing seed alone with `--seed N`, which shows what happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any, cast

import pytest

from lightning_ckptless.protocol.messages import AskToLeave, Message
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.slot_ring import SlotRing
from tests.simulation.explore import SCENARIOS, explore, failing_seeds, run
from tests.simulation.node import SimulatedNode
from tests.simulation.processes import Process
from tests.simulation.tasks import Carriers, carriers
from tests.simulation.world import Scenario, World

SEEDS = 40
MANY_SEEDS = 2000


@pytest.fixture
def threads() -> Iterator[Carriers]:
    with carriers() as made:
        yield made


@pytest.fixture
def asked(request: pytest.FixtureRequest) -> int | None:
    seed: int | None = request.config.getoption("--seed")
    return seed


@pytest.mark.parametrize("name", SCENARIOS)
def test_faults_at_any_moment(name: str, asked: int | None, threads: Carriers) -> None:
    if asked is None:
        explore(SCENARIOS[name], range(SEEDS), threads)
    else:
        print("\n".join(run(SCENARIOS[name], asked, threads).events_log))


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
def test_faults_at_any_moment_under_many_seeds(name: str, threads: Carriers) -> None:
    explore(SCENARIOS[name], range(SEEDS, MANY_SEEDS), threads)


def test_most_recoveries_are_in_place(threads: Carriers) -> None:
    worlds = explore(Scenario(nodes=(2,), steps=20, deaths=1), range(SEEDS), threads)
    in_place, relaunches = (sum(len(world.events(event)) for world in worlds) for event in ("in_place", "relaunch"))
    assert in_place > 4 * relaunches


class DiesInRestores(World):
    """A world in which rank 1 dies whenever it restores after a fault."""

    def at_moment(self, process: Process, moment: str) -> None:
        if process.rank == 1 and moment == "restore":
            self.die(process, f"at {moment}")
            self.scheduler.end_here()


class DiesOnce(DiesInRestores):
    """The same after one fault."""

    def run(self) -> None:
        self.scheduler.at(0.6, lambda: self.die(self.members()[1], ""))
        super().run()


def test_repeated_faults_during_recovery_lead_to_a_relaunch(threads: Carriers) -> None:
    world = run(Scenario(nodes=(2,)), 1, threads, DiesOnce)
    recoveries = [(event, details) for _, event, details in world.recorded if event in ("in_place", "relaunch")]
    assert [event for event, _ in recoveries] == ["in_place", "in_place", "relaunch"]
    assert "tried 2 times" in recoveries[-1][1]["reason"]


class DiesBeforeTheFirstVersion(World):
    """A world in which the rank of node 0 dies four times before any version is committed."""

    left = 4

    def note_restored(self, process: Process, version: Version | None, history: int) -> None:
        super().note_restored(process, version, history)
        if process.node == 0 and version is None and self.left:
            self.left -= 1
            self.scheduler.later(0.001, lambda: self.die(process, "before the first version"))


def test_giving_up_a_recovery_does_not_count_as_a_failed_start(threads: Carriers) -> None:
    world = run(Scenario(nodes=(1, 1)), 0, threads, DiesBeforeTheFirstVersion)
    assert isinstance(world, DiesBeforeTheFirstVersion)
    assert world.left == 0
    assert len(world.events("relaunch")) >= 4


class DiesWhileOthersFinish(World):
    """A world in which the process of a joining node dies, unknown to its agent, once the others ask to leave."""

    asked = 0
    killed = 0

    def kill_one(self) -> None:
        """No other process dies."""

    def send(self, process: Process, message: Message) -> None:
        super().send(process, message)
        self.asked += isinstance(message, AskToLeave)
        if self.asked == 2 and not self.killed:
            for joining in filter(attrgetter("joins"), self.newest().values()):
                self.killed += 1
                self.die(joining, "while the others finish")

    def _poll(self, node: SimulatedNode) -> None:
        is_joining = any(process.joins for process in self.newest().values() if process.node == node.number)
        if self.asked < 2 and is_joining:
            self._polled.discard(node.number)
            self.poll_soon(node)
        else:
            super()._poll(node)


def test_a_process_that_joins_dies_while_the_others_finish(threads: Carriers) -> None:
    worlds = explore(Scenario(nodes=(1, 1), joins=(1,)), range(SEEDS), threads, DiesWhileOthersFinish)
    after_death = [world for world in worlds if cast("DiesWhileOthersFinish", world).killed]
    assert {bool(world.events("joined_too_late")) for world in after_death} == {False, True}


class FirstSlot(SlotRing):
    """A ring that always overwrites its first slot."""

    def free(self) -> Any:
        first = self._slots[0]
        if first.view.snapshot is not None:
            first.discard()
        return first


class AlwaysFirstSlot(World):
    """A world with such rings, which the simulation must detect."""

    def ring_of(self, slots: Any, committed: Version | None) -> SlotRing:
        return FirstSlot(slots, committed)


def test_a_weaker_rule_is_detected(threads: Carriers) -> None:
    found = failing_seeds(SCENARIOS["one death"], range(SEEDS), threads, AlwaysFirstSlot)
    assert any("was committed" in error for error in found.values())


def test_a_seed_is_reproducible(threads: Carriers) -> None:
    first, second = (run(SCENARIOS["deaths in recoveries"], 7, threads).events_log for _ in range(2))
    assert first == second
    assert len(first) > len(SCENARIOS["deaths in recoveries"].nodes)
