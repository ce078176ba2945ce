"""A simulation of a run that trains, mirrors, dies and recovers, in one thread with a simulated clock and a seed.

The decisions are made by the code of a real run: the kind of recovery (`plan_recovery`), the worker states
(`next_state`), the version (`newest_complete`), the slot (`target_slot`, `settle`, `advance`). The environment is
simulated: delayed and lost messages, agents that detect deaths at different times, ranks that are ahead of others, and
processes that may die between any two events.
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
"""Rendezvous round and number of the regrouping within it. Workers with the same meeting train together."""


@dataclass
class SlotPair:
    """The two slots of a rank's own shard; they outlive the process."""

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
    notified: int = 0
    round_is_open: bool = False
    then: Callable[[], None] | None = None


@dataclass
class World:
    """The simulated run and its pending events.

    Args:
        seed: determines all delays and deaths.
        nodes: index of the node of each rank.
        steps: number of steps of the run.
        deaths: number of processes to kill at random moments.
        pace_s: mean duration of a step, in seconds.
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
    events_log: list[str] = field(default_factory=list)

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
        """Schedule an action after a random delay."""
        delay_s = self.chance.expovariate(1.0 / mean_s)
        heapq.heappush(self._events, (self.now + delay_s, next(self._order), action))

    def log(self, text: str) -> None:
        """Record an event, for debugging a seed."""
        self.events_log.append(f"{self.now:8.3f}  {text}")

    def run(self, most_events: int = 200_000) -> None:
        """Run all events until none is left."""
        self.start_all()
        for _ in range(self.deaths):
            self.later(self.pace_s * self.steps / 2, self.kill_one)
        for _ in range(most_events):
            if not self._events:
                return
            self.now, _, action = heapq.heappop(self._events)
            action()
        raise AssertionError("the run does not end")

    # ------------------------------------------------------------------ processes

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.nodes)

    def ranks(self) -> list[Process]:
        """The newest process of each rank."""
        newest: dict[int, Process] = {}
        for process in self.processes:
            newest[process.rank] = process
        return [newest[rank] for rank in sorted(newest)]

    def start_all(self) -> None:
        """Start a rendezvous round: every rank gets a new process."""
        self.round, self.number, self.tries = self.round + 1, 0, 0
        for rank in range(self.world_size):
            self.start(rank)

    def start(self, rank: int) -> None:
        """Start a process, which reaches the training loop after a delay."""
        process = Process(next(self._names), rank, (self.round, self.number))
        process.notified = self.number
        self.processes.append(process)
        self.later(0.3, lambda: self.arrive(process))

    def kill_one(self) -> None:
        """Kill a random process."""
        living = [process for process in self.ranks() if process.alive and process.state is not WorkerState.ENDED]
        if living and min(process.step for process in living) < self.steps:
            self.die(self.chance.choice(living))

    def die(self, process: Process) -> None:
        """Kill a process; its agent detects that after a delay."""
        if process.alive:
            process.alive = False
            self.log(f"rank {process.rank} ({process.name}) dies at step {process.step}, {process.state}")
            self.later(0.02, lambda: self.agent_sees(process))

    def move(self, process: Process, event: WorkerEvent) -> None:
        """Move a worker to its next state, as the table allows."""
        process.state = next_state(process.state, event)

    # ------------------------------------------------------------------ agents

    def agent_sees(self, lost: Process) -> None:
        """The agent of a dead process chooses the kind of recovery."""
        if lost.meeting[0] != self.round or lost.name in self._handled or lost is not self.ranks()[lost.rank]:
            return
        lost_here = [p for p in self.ranks() if not p.alive and self.nodes[p.rank] == self.nodes[lost.rank]]
        self._handled |= {process.name for process in lost_here}
        plan = plan_recovery(
            Situation(
                lost=tuple(process.rank for process in lost_here),
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
        self.log(f"node {self.nodes[lost.rank]}: {plan.rung}: {plan.reason}")
        if plan.rung is Rung.IN_PLACE:
            self.regroup(lost_here)
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
        """Stop all processes and start new ones."""
        self.relaunches += 1
        for process in self.processes:
            process.alive = False
        self._waiting.clear()
        self.start_all()

    def regroup(self, lost: list[Process]) -> None:
        """Start the next regrouping: replace the lost processes and notify the survivors, each after a delay."""
        self.in_place += 1
        self.tries += 1
        self.number += 1
        meeting = self.round, self.number
        for process in lost:
            self.start(process.rank)
        for process in self.ranks():
            if process.alive and process not in lost and process.meeting != meeting:
                self.later(0.005, partial(self.hear, process, meeting))

    def hear(self, process: Process, meeting: Meeting) -> None:
        """A worker is notified of a regrouping; only the newest counts."""
        if not process.alive or meeting[0] != self.round or meeting[1] <= process.notified:
            return
        process.notified = meeting[1]
        if process.state in (WorkerState.TRAINING, WorkerState.REGROUPING, WorkerState.RESTORING):
            self.move(process, WorkerEvent.FAULT)
            self.later(0.002, lambda: self.come(process, meeting))

    def come(self, process: Process, meeting: Meeting) -> None:
        """A worker that released its groups joins the regrouping."""
        if process.alive and process.state is WorkerState.CUT and process.notified == meeting[1]:
            self.move(process, WorkerEvent.ASSIGN)
            self.meet(process, meeting)

    # ------------------------------------------------------------------ workers

    def arrive(self, process: Process) -> None:
        """A new process reaches the training loop."""
        if not process.alive or process.meeting[0] != self.round:
            return
        if process.meeting[1]:
            self.move(process, WorkerEvent.ASSIGN)
        else:
            self.move(process, WorkerEvent.ENTER)
            self.move(process, WorkerEvent.FAULT)
            self.move(process, WorkerEvent.ASSIGN)
        self.meet(process, (self.round, process.notified))

    def together(self, key: tuple[object, ...], process: Process, action: Callable[[], None]) -> None:
        """Wait until all ranks have reached the same point of the same meeting; then all continue."""
        present = self._waiting.setdefault(key, {})
        present[process.rank] = process, action
        if len(present) == self.world_size and all(p.alive for p, _ in present.values()):
            del self._waiting[key]
            for waiting, then in present.values():
                self.later(0.002, partial(_if_alive, waiting, then))

    def meet(self, process: Process, meeting: Meeting) -> None:
        """Join a meeting, which completes when all ranks have joined."""
        process.meeting = meeting
        self.together(("meet", meeting), process, lambda: self.restore(process, meeting))

    def restore(self, process: Process, meeting: Meeting) -> None:
        """Choose the version, as all other ranks do, and restore it."""
        if process.state is not WorkerState.REGROUPING or process.meeting != meeting:
            return
        self.move(process, WorkerEvent.MEET)
        # No rank writes into the arenas between the meeting and the end of its restore.
        found = newest_complete(self.inventory())
        self.later(0.02, lambda: self.restored(process, meeting, found if isinstance(found, Complete) else None))

    def restored(self, process: Process, meeting: Meeting, found: Complete | None) -> None:
        """The state is restored; training continues once that is so on all ranks."""
        if process.state is not WorkerState.RESTORING or process.meeting != meeting:
            return

        def resume() -> None:
            if process.state is not WorkerState.RESTORING or process.meeting != meeting:
                return
            self.move(process, WorkerEvent.RESTORE)
            process.committed = found.snapshot if found is not None else None
            process.step = found.snapshot.version.optimizer_step if found is not None else 0
            process.generation = self.generation_of(meeting)
            process.round_is_open, process.then = False, None
            self.settle_slots(process)
            self.begin_step(process)

        self.together(("restored", meeting), process, resume)

    def generation_of(self, meeting: Meeting) -> int:
        """The generation, which increases with every meeting."""
        return meeting[0] * 1000 + meeting[1]

    # ------------------------------------------------------------------ slots

    def settle_slots(self, process: Process) -> None:
        """Settle the existing slots in a new generation."""
        slots = self.slot_pairs[process.rank].slots
        for number, view in enumerate(slots):
            event = settle(view, process.committed)
            if event is not None:
                self.change(process, number, event, view.snapshot)

    def change(self, process: Process, number: int, event: SlotEvent, snapshot: Snapshot | None) -> None:
        """Apply an event to a slot, as the table allows."""
        slots = self.slot_pairs[process.rank].slots
        version = snapshot.version if snapshot is not None else None
        state = advance(slots[number].state, event, shard=process.rank, rank=process.rank, version=version)
        slots[number] = SlotView(state, None if state is SlotState.EMPTY else snapshot)

    def inventory(self) -> list[Replica]:
        """Contents of all arenas."""
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
        """Whether a process is still training in a generation."""
        return process.alive and process.state is WorkerState.TRAINING and process.generation == generation

    def begin_step(self, process: Process) -> None:
        """Compute a step and reduce the gradients with all ranks."""
        if process.step >= self.steps:
            self.after_round(process, lambda: self.move(process, WorkerEvent.LEAVE))
            return
        generation, step = process.generation, process.step + 1

        def reduce() -> None:
            if self.trains(process, generation):
                self.together(("step", generation, step), process, lambda: self.end_step(process, generation, step))

        self.later(self.pace_s, reduce)

    def end_step(self, process: Process, generation: int, step: int) -> None:
        """Apply the step; its version is copied while the next step is computed."""
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
        """The slot into which the next version is written."""
        return target_slot(views, process.committed)

    def after_round(self, process: Process, then: Callable[[], None]) -> None:
        """Run an action when the current mirror round has ended; there is one at a time."""
        if process.round_is_open:
            process.then = then
        else:
            then()

    def seal(self, process: Process, generation: int, number: int, snapshot: Snapshot) -> None:
        """The copy is complete; vote on the round."""
        if not self.trains(process, generation):
            return
        self.change(process, number, SlotEvent.SEAL, snapshot)
        self.together(("vote", snapshot), process, lambda: self.learn(process, generation, number, snapshot))

    def learn(self, process: Process, generation: int, number: int, snapshot: Snapshot) -> None:
        """This rank learns that all ranks have voted."""
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
