"""A world in which a run trains, mirrors, dies and recovers: one thread, a clock of its own, chance from a seed.

What decides here is the code that decides in a run: the rung (`plan_recovery`), what a worker may do next
(`next_state`), the version (`newest_complete`), the slot (`target_slot`, `settle`, `advance`). What is played is all
that they are surrounded by: messages that come late or die with their reader, agents that see a death in their own
time, ranks that are ahead of each other, and a process that may end between any two events.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from lightning_ckptless.protocol.crash_loop import Stage
from lightning_ckptless.protocol.recovery import (
    RecoveryPlan,
    Rung,
    Situation,
    WorkerEvent,
    WorkerState,
    next_state,
    plan_recovery,
)
from lightning_ckptless.protocol.slots import SlotEvent, SlotView, advance, settle, target_slot
from lightning_ckptless.protocol.versions import Complete, Replica, SlotState, Snapshot, Version, newest_complete

Meeting = tuple[int, int]
"""Round of the rendezvous and number of the regrouping in it: who meets under the same trains together."""


@dataclass
class SlotPair:
    """The two slots of one rank's own shard; they outlive the process."""

    slots: list[SlotView] = field(default_factory=lambda: [SlotView(), SlotView()])


@dataclass
class Process:
    """One worker."""

    name: int
    rank: int
    meeting: Meeting
    state: WorkerState = WorkerState.OUTSIDE
    alive: bool = True
    step: int = 0
    generation: int = 0
    committed: Snapshot | None = None
    told: int = 0
    round_is_open: bool = False
    then: Callable[[], None] | None = None


@dataclass
class World:
    """Everything, and the events to come.

    Args:
        seed: decides all delays and all deaths.
        nodes: number of the node of each rank.
        steps: that the run is to make.
        deaths: processes that are killed, at moments of chance.
        pace_s: about the length of a step.
    """

    seed: int
    nodes: tuple[int, ...]
    steps: int
    deaths: int
    pace_s: float = 1.0
    now: float = 0.0
    round: int = 0
    number: int = 0
    tries: int = 0
    generations: int = 0
    newest_committed: int = 0
    relaunches: int = 0
    in_place: int = 0
    plans: list[RecoveryPlan] = field(default_factory=list)
    story: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.slot_pairs = [SlotPair() for _ in self.nodes]
        self.processes: list[Process] = []
        self._names = count()
        self._waiting: dict[tuple[object, ...], dict[int, tuple[Process, Callable[[], None]]]] = {}
        self._handled: set[int] = set()

    # ------------------------------------------------------------------ time

    def later(self, mean_s: float, action: Callable[[], None]) -> None:
        """Do something in a while."""
        delay_s = self.chance.expovariate(1.0 / mean_s)
        heapq.heappush(self._events, (self.now + delay_s, next(self._order), action))

    def tell(self, text: str) -> None:
        """Write the story down, for whoever has to understand a seed."""
        self.story.append(f"{self.now:8.3f}  {text}")

    def run(self, most_events: int = 200_000) -> None:
        """Let everything happen, until nothing is left to happen."""
        self.start_all()
        for _ in range(self.deaths):
            self.later(self.pace_s * self.steps / 2, self.kill_somebody)
        for _ in range(most_events):
            if not self._events:
                return
            self.now, _, action = heapq.heappop(self._events)
            action()
        raise AssertionError("the run does not come to an end")

    # ------------------------------------------------------------------ processes

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.nodes)

    def ranks(self) -> list[Process]:
        """The process of each rank that has been started last."""
        newest: dict[int, Process] = {}
        for process in self.processes:
            newest[process.rank] = process
        return [newest[rank] for rank in sorted(newest)]

    def start_all(self) -> None:
        """A round of the rendezvous: every rank gets a new process."""
        self.round, self.number, self.tries = self.round + 1, 0, 0
        for rank in range(self.world_size):
            self.start(rank)

    def start(self, rank: int) -> None:
        """Start one process; it comes to the training loop in its own time."""
        process = Process(next(self._names), rank, (self.round, self.number))
        process.told = self.number
        self.processes.append(process)
        self.later(0.3, lambda: self.arrive(process))

    def kill_somebody(self) -> None:
        """One process ends, whatever it is doing."""
        living = [process for process in self.ranks() if process.alive and process.state is not WorkerState.ENDED]
        if living and min(process.step for process in living) < self.steps:
            self.die(self.chance.choice(living))

    def die(self, process: Process) -> None:
        """A process ends; its agent sees it a little later."""
        if process.alive:
            process.alive = False
            self.tell(f"rank {process.rank} ({process.name}) dies at step {process.step}, {process.state}")
            self.later(0.02, lambda: self.agent_sees(process))

    def move(self, process: Process, event: WorkerEvent) -> None:
        """A worker goes on to its next state, as the table allows."""
        process.state = next_state(process.state, event)

    # ------------------------------------------------------------------ agents

    def agent_sees(self, lost: Process) -> None:
        """The agent of a dead process takes the ladder."""
        if lost.meeting[0] != self.round or lost.name in self._handled or lost is not self.ranks()[lost.rank]:
            return
        gone = [p for p in self.ranks() if not p.alive and self.nodes[p.rank] == self.nodes[lost.rank]]
        self._handled |= {process.name for process in gone}
        plan = plan_recovery(
            Situation(
                lost=tuple(process.rank for process in gone),
                world_size=self.world_size,
                final=None,
                exhausted=None,
                in_place=True,
                obstacle=None,
                outside=self._outside(self.nodes[lost.rank]),
                tries=self.tries,
            )
        )
        self.plans.append(plan)
        self.tell(f"node {self.nodes[lost.rank]}: {plan.rung}: {plan.reason}")
        if plan.rung is Rung.IN_PLACE:
            self.regroup(gone)
        else:
            self.relaunch()

    def _outside(self, node: int) -> dict[int, Stage]:
        first_time = (WorkerState.OUTSIDE,)
        return {
            p.rank: Stage.BEFORE
            for p in self.ranks()
            if self.nodes[p.rank] == node and p.state in first_time and p.meeting[1] == 0
        }

    def relaunch(self) -> None:
        """All end, and all are started again."""
        self.relaunches += 1
        for process in self.processes:
            process.alive = False
        self._waiting.clear()
        self.start_all()

    def regroup(self, gone: list[Process]) -> None:
        """Open the next number, replace the dead, and tell the living, each in his own time."""
        self.in_place += 1
        self.tries += 1
        self.number += 1
        meeting = self.round, self.number
        for process in gone:
            self.start(process.rank)
        for process in self.ranks():
            if process.alive and process not in gone and process.meeting != meeting:
                self.later(0.005, partial(self.hear, process, meeting))

    def hear(self, process: Process, meeting: Meeting) -> None:
        """A worker is told of a regrouping; only the newest counts."""
        if not process.alive or meeting[0] != self.round or meeting[1] <= process.told:
            return
        process.told = meeting[1]
        if process.state in (WorkerState.TRAINING, WorkerState.REGROUPING, WorkerState.RESTORING):
            self.move(process, WorkerEvent.FAULT)
            self.later(0.002, lambda: self.come(process, meeting))

    def come(self, process: Process, meeting: Meeting) -> None:
        """A worker that was cut off goes to the meeting."""
        if process.alive and process.state is WorkerState.CUT and process.told == meeting[1]:
            self.move(process, WorkerEvent.ASSIGN)
            self.meet(process, meeting)

    # ------------------------------------------------------------------ workers

    def arrive(self, process: Process) -> None:
        """A new process comes to the training loop."""
        if not process.alive or process.meeting[0] != self.round:
            return
        if process.meeting[1]:
            self.move(process, WorkerEvent.ASSIGN)
        else:
            self.move(process, WorkerEvent.ENTER)
            self.move(process, WorkerEvent.FAULT)
            self.move(process, WorkerEvent.ASSIGN)
        self.meet(process, (self.round, process.told))

    def together(self, key: tuple[object, ...], process: Process, action: Callable[[], None]) -> None:
        """Wait until all ranks have come to the same point under the same meeting; then each goes on."""
        present = self._waiting.setdefault(key, {})
        present[process.rank] = process, action
        if len(present) == self.world_size and all(p.alive for p, _ in present.values()):
            del self._waiting[key]
            for waiting, then in present.values():
                self.later(0.002, partial(_if_alive, waiting, then))

    def meet(self, process: Process, meeting: Meeting) -> None:
        """Come to a meeting; it is held when all ranks are there."""
        process.meeting = meeting
        self.together(("meet", meeting), process, lambda: self.restore(process, meeting))

    def restore(self, process: Process, meeting: Meeting) -> None:
        """Choose the version, as all others do, and take it."""
        if process.state is not WorkerState.REGROUPING or process.meeting != meeting:
            return
        self.move(process, WorkerEvent.MEET)
        # Nobody writes into the arenas between the meeting and the end of its restore.
        found = newest_complete(self.inventory())
        self.later(0.02, lambda: self.restored(process, meeting, found if isinstance(found, Complete) else None))

    def restored(self, process: Process, meeting: Meeting, found: Complete | None) -> None:
        """The state is in place; training goes on when it is so everywhere."""
        if process.state is not WorkerState.RESTORING or process.meeting != meeting:
            return

        def go_on() -> None:
            if process.state is not WorkerState.RESTORING or process.meeting != meeting:
                return
            self.move(process, WorkerEvent.RESTORE)
            process.committed = found.snapshot if found is not None else None
            process.step = found.snapshot.version.optimizer_step if found is not None else 0
            process.generation = self.generation_of(meeting)
            process.round_is_open, process.then = False, None
            self.settle_shelf(process)
            self.begin_step(process)

        self.together(("restored", meeting), process, go_on)

    def generation_of(self, meeting: Meeting) -> int:
        """Numbers grow with meetings, over rounds."""
        return meeting[0] * 1000 + meeting[1]

    # ------------------------------------------------------------------ slots

    def settle_shelf(self, process: Process) -> None:
        """What a new generation does to the slots that it finds."""
        slots = self.slot_pairs[process.rank].slots
        for number, view in enumerate(slots):
            event = settle(view, process.committed)
            if event is not None:
                self.change(process, number, event, view.snapshot)

    def change(self, process: Process, number: int, event: SlotEvent, snapshot: Snapshot | None) -> None:
        """One event of a slot, as the table allows."""
        slots = self.slot_pairs[process.rank].slots
        version = snapshot.version if snapshot is not None else None
        state = advance(slots[number].state, event, shard=process.rank, rank=process.rank, version=version)
        slots[number] = SlotView(state, None if state is SlotState.EMPTY else snapshot)

    def inventory(self) -> list[Replica]:
        """What all arenas hold."""
        return [
            Replica(
                rank, rank, f"node{self.nodes[rank]}", number, view.snapshot.version, view.snapshot.generation,
                self.world_size, "layout", view.state, 1, 1, "",
            )
            for rank, slot_pair in enumerate(self.slot_pairs)
            for number, view in enumerate(slot_pair.slots)
            if view.snapshot is not None
        ]  # fmt: skip

    # ------------------------------------------------------------------ training

    def trains(self, process: Process, generation: int) -> bool:
        """Whether a process is still in the generation in which something of its was begun."""
        return process.alive and process.state is WorkerState.TRAINING and process.generation == generation

    def begin_step(self, process: Process) -> None:
        """Compute, and sum the gradients with all others."""
        if process.step >= self.steps:
            self.after_round(process, lambda: self.move(process, WorkerEvent.LEAVE))
            return
        generation, step = process.generation, process.step + 1

        def reduce() -> None:
            if self.trains(process, generation):
                self.together(("step", generation, step), process, lambda: self.end_step(process, generation, step))

        self.later(self.pace_s, reduce)

    def end_step(self, process: Process, generation: int, step: int) -> None:
        """The parameters change; the version is copied while the next step is computed."""
        if not self.trains(process, generation):
            return
        if process.round_is_open:
            self.after_round(process, lambda: self.end_step(process, generation, step))
            return
        assert process.step == step - 1, f"rank {process.rank} applies step {step} after {process.step}"
        process.step, process.round_is_open = step, True
        snapshot = Snapshot(Version(step, True), generation, self.world_size, "layout")
        views = self.slot_pairs[process.rank].slots
        number = self.slot_for(process, (views[0], views[1]))
        if views[number].state in (SlotState.WRITING, SlotState.STAGED):
            self.change(process, number, SlotEvent.DISCARD, views[number].snapshot)
        self.change(process, number, SlotEvent.BEGIN, snapshot)
        self.later(self.pace_s / 2, lambda: self.seal(process, generation, number, snapshot))
        self.begin_step(process)

    def slot_for(self, process: Process, views: tuple[SlotView, SlotView]) -> int:
        """The slot that the next version is written into."""
        return target_slot(views, process.committed)

    def after_round(self, process: Process, then: Callable[[], None]) -> None:
        """Do something when the round under way has ended: one is under way at a time."""
        if process.round_is_open:
            process.then = then
        else:
            then()

    def seal(self, process: Process, generation: int, number: int, snapshot: Snapshot) -> None:
        """The copy is whole; the round is voted on."""
        if not self.trains(process, generation):
            return
        self.change(process, number, SlotEvent.SEAL, snapshot)
        self.together(("vote", snapshot), process, lambda: self.learn(process, generation, number, snapshot))

    def learn(self, process: Process, generation: int, number: int, snapshot: Snapshot) -> None:
        """This rank learns that all have voted."""
        self.newest_committed = max(self.newest_committed, snapshot.version.optimizer_step)
        if not self.trains(process, generation):
            return
        self.change(process, number, SlotEvent.COMMIT, snapshot)
        process.committed = snapshot
        self.tries, process.round_is_open = 0, False
        then, process.then = process.then, None
        if then is not None:
            then()


def _if_alive(process: Process, then: Callable[[], None]) -> None:
    if process.alive:
        then()
