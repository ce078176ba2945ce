"""A simulation of a run that trains, mirrors, dies and recovers, in one thread with a simulated clock and a seed.

The agents are those of a real run, with all their parts (`simulated_node.py`). The workers are simulated; their
decisions are made by the code of a real worker: its states (`next_state`), the version (`newest_complete`), the slot
(`target_slot`, `settle`, `advance`). The environment is simulated: delayed messages, agents that detect deaths at
different times, ranks that are ahead of others, and processes that may die between any two events.
"""

from __future__ import annotations

import heapq
import random
import signal
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from lightning_ckptless.membership.forkserver.client import End
from lightning_ckptless.protocol.messages import (
    AskToLeave,
    EnteredLoop,
    FitReturned,
    LeftLoop,
    MayLeave,
    Message,
    ReachedFit,
    Regroup,
    Regrouped,
    ReleasedGroups,
    StepCommitted,
    WaitingAtLoop,
)
from lightning_ckptless.protocol.recovery import WorkerEvent, WorkerState, next_state
from lightning_ckptless.protocol.slots import SlotEvent, SlotView, advance, settle, target_slot
from lightning_ckptless.protocol.uneven_steps import WhyEnded
from lightning_ckptless.protocol.versions import Complete, Replica, SlotState, Snapshot, Version, newest_complete
from tests.protocol.simulated_node import (
    ROUND,
    RoundStore,
    SimulatedChannel,
    SimulatedNode,
    SimulatedProcess,
    regrouping_of,
)

Meeting = tuple[int, int]
"""Round of the rendezvous and number of the regrouping within it. Workers with the same meeting train together."""
ENTERED = EnteredLoop(
    in_place=True,
    standbys=0,
    preload_imports=False,
    hang_timeout_s=None,
    max_recoveries_without_progress=1000,
    max_recoveries_per_hour=1000,
    obstacle=None,
    bar="none",
    fixed_world="",
    straggler_factor=1.5,
    drain_stragglers_after_s=None,
)
_FIRST_PID = 1 << 23
"""Larger than any process id of the system."""


@dataclass
class SlotPair:
    """The two slots of a rank's own shard; they outlive the process."""

    slots: list[SlotView] = field(default_factory=lambda: [SlotView(), SlotView()])


@dataclass
class Process:
    """One worker.

    Attributes:
        notified: newest meeting that it was notified of.
        joins: whether it joins workers that train, rather than starting together with all.
        end: how it has exited; None while it runs.
    """

    name: int
    rank: int
    meeting: Meeting
    joins: bool
    state: WorkerState = WorkerState.OUTSIDE
    end: End | None = None
    step: int = 0
    generation: int = 0
    committed: Snapshot | None = None
    notified: Meeting = (0, 0)
    round_is_open: bool = False
    then: Callable[[], None] | None = None
    has_reported_commit: bool = False
    to_worker: deque[Message] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.notified = self.meeting

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.end is None


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
    newest_committed: int = 0
    recorded: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    events_log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.slot_pairs = [SlotPair() for _ in self.nodes]
        self.processes: list[Process] = []
        self._names = count()
        self._channels: dict[int, SimulatedChannel] = {}
        self._waiting: dict[tuple[object, ...], dict[int, tuple[Process, Callable[[], None]]]] = {}
        self._changed = False
        self._meeting: set[int] = set()
        self.agents = [self._make_node(number) for number in sorted(set(self.nodes))]

    def _make_node(self, number: int) -> SimulatedNode:
        of_node = [rank for rank, node in enumerate(self.nodes) if node == number]
        return SimulatedNode(number, dict(enumerate(of_node)), self.start, lambda: self.now, self._record, self.log)

    def _record(self, event: str, **details: Any) -> None:
        self.recorded.append((event, details))

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
        for node in self.agents:
            node.meets = True
        self.meet_nodes()
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

    def count(self, event: str) -> int:
        """How often the agents have recorded an event."""
        return sum(name == event for name, _ in self.recorded)

    def start(self, env: Mapping[str, str]) -> SimulatedProcess:
        """Start a process, which reaches the training loop after a delay."""
        meeting = regrouping_of(env)
        process = Process(next(self._names), int(env["RANK"]), meeting, joins=meeting[1] > 0)
        self.processes.append(process)
        self.log(f"rank {process.rank} ({process.name}) is started for {meeting}")
        self.later(0.3, lambda: self.arrive(process))
        self._channels[process.name] = SimulatedChannel(partial(self._send_to_worker, process))
        return SimulatedProcess(
            _FIRST_PID + process.name,
            self._channels[process.name],
            lambda number: self._end(process, -number),
            lambda: process.end,
        )

    def _end(self, process: Process, exit_code: int) -> None:
        if process.end is None:
            process.end = End(exit_code, self.now)

    def kill_one(self) -> None:
        """Kill a random process."""
        living = [process for process in self.ranks() if process.alive]
        if living and min(process.step for process in living) < self.steps:
            self.die(self.chance.choice(living))

    def die(self, process: Process) -> None:
        """Kill a process; its agent detects that after a delay."""
        if process.alive:
            self._end(process, -signal.SIGKILL)
            self.log(f"rank {process.rank} ({process.name}) dies at step {process.step}, {process.state}")
            self.poll_soon(self.node_of(process), 0.02)

    def move(self, process: Process, event: WorkerEvent) -> None:
        """Move a worker to its next state, as the table allows."""
        process.state = next_state(process.state, event)

    # ------------------------------------------------------------------ agents

    def node_of(self, process: Process) -> SimulatedNode:
        """The node of a process."""
        return self.agents[self.nodes[process.rank]]

    def poll_soon(self, node: SimulatedNode, mean_s: float = 0.005) -> None:
        """Let an agent react after a delay."""
        self.later(mean_s, partial(self._poll, node))

    def _poll(self, node: SimulatedNode) -> None:
        self._changed = False
        node.poll(lambda: bool(self._meeting), lambda: self._meet(node))
        if self._changed:
            for other in self.agents:
                if other is not node:
                    self.poll_soon(other)

    def _note_change(self) -> None:
        self._changed = True

    def _meet(self, node: SimulatedNode) -> None:
        """A node waits in a rendezvous, which completes when all do."""
        self._changed = True
        self.log(f"node {node.number} waits for the other nodes")
        self._meeting.add(node.number)
        if len(self._meeting) == len(self.agents):
            self.later(0.05, self.meet_nodes)

    def meet_nodes(self) -> None:
        """Complete a rendezvous: the agents agree on what follows, and each acts after a delay."""
        self.round += 1
        self._meeting.clear()
        store = RoundStore(self._note_change)
        for node in self.agents:
            node.publish_status(store)
        for node in self.agents:
            self.later(0.01, partial(self._begin_round, node, store, self.round))

    def _begin_round(self, node: SimulatedNode, store: RoundStore, number: int) -> None:
        node.begin_round(store, number, len(self.agents), self.world_size)
        self.poll_soon(node)

    # ------------------------------------------------------------------ messages

    def send(self, process: Process, message: Message) -> None:
        """Send a message of a worker to its agent, which reads it after a delay."""
        self._channels[process.name].arrive(message)
        self.poll_soon(self.node_of(process))

    def _send_to_worker(self, process: Process, message: Message) -> None:
        process.to_worker.append(message)
        self.later(0.005, partial(self._hear_next, process))

    def _hear_next(self, process: Process) -> None:
        message = process.to_worker.popleft()
        if not process.alive:
            return
        match message:
            case Regroup(number, _, env):
                self.hear(process, (int(env.get(ROUND, process.notified[0])), number))
            case MayLeave(number) if number == process.meeting[1] and process.state is WorkerState.TRAINING:
                self.leave(process)

    def hear(self, process: Process, meeting: Meeting) -> None:
        """A worker is notified of a regrouping; only the newest counts."""
        if meeting <= process.notified:
            return
        process.notified = meeting
        if process.state in (WorkerState.TRAINING, WorkerState.REGROUPING, WorkerState.RESTORING):
            self.move(process, WorkerEvent.FAULT)
            self.later(0.002, lambda: self.come(process))

    def come(self, process: Process) -> None:
        """A worker that released its groups joins the newest regrouping."""
        if process.alive and process.state is WorkerState.ABORTED:
            self.send(process, ReleasedGroups())
            self.move(process, WorkerEvent.ASSIGN)
            self.meet(process, process.notified)

    # ------------------------------------------------------------------ workers

    def arrive(self, process: Process) -> None:
        """A new process reaches the training loop."""
        if not process.alive:
            return
        self.send(process, ReachedFit())
        if process.joins:
            self.move(process, WorkerEvent.ASSIGN)
        else:
            self.move(process, WorkerEvent.ENTER)
            self.move(process, WorkerEvent.FAULT)
            self.move(process, WorkerEvent.ASSIGN)
        self.send(process, ENTERED)
        if process.joins:
            self.send(process, WaitingAtLoop())
        self.send(process, ReleasedGroups())
        self.meet(process, process.notified)

    def leave(self, process: Process) -> None:
        """All ranks have made their last step: leave the training loop, and exit."""
        self.move(process, WorkerEvent.LEAVE)
        self.send(process, LeftLoop())
        self.send(process, FitReturned())
        self.later(0.01, lambda: self._exit(process))

    def _exit(self, process: Process) -> None:
        self._end(process, 0)
        self.poll_soon(self.node_of(process))

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
        self.move(process, WorkerEvent.JOIN)
        self.send(process, Regrouped(meeting[1]))
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
            process.round_is_open, process.then, process.has_reported_commit = False, None, False
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
            ask = AskToLeave(process.meeting[1], process.step, str(WhyEnded.NO_DATA))
            self.after_round(process, lambda: self.send(process, ask))
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
        process.round_is_open = False
        self.report_commit(process)
        then, process.then = process.then, None
        if then is not None:
            then()

    def report_commit(self, process: Process) -> None:
        """Report the first commit of a generation to the agent."""
        if not process.has_reported_commit:
            process.has_reported_commit = True
            self.node_of(process).reports.has_begun = True
            self.send(process, StepCommitted([]))


def _if_alive(process: Process, then: Callable[[], None]) -> None:
    if process.alive:
        then()
