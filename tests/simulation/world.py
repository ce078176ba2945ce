"""A simulated run in virtual time: it trains, mirrors, loses processes and recovers, in an order set by a seed.

What runs is the code of a real run: the agents with all their parts (`node.py`), and in every worker the recovery loop,
the regroupings, the member set, the watcher and the report (`worker.py`). Simulated are what is below them: clock,
store, messages, process groups, arenas, and processes, which may die at every moment.

The invariants are checked while the run proceeds, and once it has ended (`invariants.py`).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from torch.distributed.distributed_c10d import Store
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from lightning_ckptless import environment
from lightning_ckptless.membership.forkserver.client import End
from lightning_ckptless.protocol.messages import Message
from lightning_ckptless.protocol.node_liveness import NodesLost, Partitioned
from lightning_ckptless.protocol.recovery import WorkerState
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.slot_ring import SlotRing
from tests.simulation.arena import MemoryArena
from tests.simulation.network import Group
from tests.simulation.node import RoundStore, SimulatedChannel, SimulatedNode, SimulatedProcess
from tests.simulation.processes import PORT, Process
from tests.simulation.tasks import Carriers, Scheduler
from tests.simulation.worker import Worker

_FIRST_PID = 1 << 23
"""Larger than any process id of the system."""
_LONGEST_S = 120.0


@dataclass(frozen=True)
class Scenario:
    """What happens to a run.

    Args:
        nodes: number of ranks on each node.
        steps: number of steps of the run.
        deaths: number of processes to kill at random instants.
        deaths_at_moments: number of processes that die at a random moment of a recovery.
        joins: number of ranks of each node that joins the run later.
        losses: number of nodes that are lost with their arenas.
        partitions: number of nodes that are cut off from the others; each returns, with its arena.
    """

    nodes: tuple[int, ...]
    steps: int = 6
    deaths: int = 0
    deaths_at_moments: int = 0
    joins: tuple[int, ...] = ()
    losses: int = 0
    partitions: int = 0


@dataclass
class GenerationCount:
    """The number of the last generation, which survives all arenas."""

    number: int = 0

    def last(self) -> int:
        """See `member_set.GenerationCount`."""
        return self.number

    def record(self, number: int) -> None:
        """See `member_set.GenerationCount`."""
        self.number = max(self.number, number)


class World:
    """The simulated run.

    Args:
        scenario: what happens to it.
        seed: determines all delays and deaths.
        carriers: threads for the workers.

    Attributes:
        recorded: the events of agents and workers.
        events_log: what has happened, for a failing seed.
        committed: step of the newest version that any rank knows to be committed.
        trained: newest generation that has made a step.
        arenas: of the nodes, by their numbers.
        begun: the last step that each rank has begun, by node.
        nodes: the newest agent of each node, by its number.
    """

    pace_s = 0.1
    start_s = 0.05

    def __init__(self, scenario: Scenario, seed: int, carriers: Carriers) -> None:
        self.scenario = scenario
        self.steps = scenario.steps
        self.scheduler = Scheduler(seed, carriers)
        self.recorded: list[tuple[float, str, dict[str, Any]]] = []
        self.events_log: list[str] = []
        self.committed = self._history = 0
        self.trained = 0
        self.generations = GenerationCount()
        self.arenas: dict[int, MemoryArena] = {}
        self.begun: dict[int, dict[int, int]] = {}
        self.processes: list[Process] = []
        self._workers: dict[int, Worker] = {}
        self._names = count()
        self._channels: dict[int, SimulatedChannel] = {}
        self._groups: dict[tuple[int, int, int], Group] = {}
        self._stores: dict[int, RoundStore] = {}
        self._round = 0
        self._changed = False
        self._meeting: set[int] = set()
        self._polled: set[int] = set()
        self._deaths_at_moments = scenario.deaths_at_moments
        self._gone: set[int] = set()
        self._silent: set[int] = set()
        self._cut: set[int] = set()
        self.nodes: dict[int, SimulatedNode] = {}
        for number, size in enumerate(scenario.nodes):
            self._add_node(number, size)

    def _add_node(self, number: int, size: int) -> SimulatedNode:
        start = partial(self._start, number)
        node = SimulatedNode(number, size, start, lambda: self.scheduler.now, self.record, self.log)
        self.nodes[number] = node
        self.arenas.setdefault(number, MemoryArena(f"node{number}"))
        return node

    # ------------------------------------------------------------------ what happens

    def run(self) -> None:
        """Run to the end.

        Raises:
            AssertionError: an invariant is violated, or the run does not end.
        """
        for node in list(self.nodes.values()):
            node.meets = True
            self._meet(node)
        for _ in range(self.scenario.deaths):
            self._sometime(self.kill_one)
        for number, size in enumerate(self.scenario.joins, len(self.nodes)):
            self._sometime(partial(self._join, number, size))
        for _ in range(self.scenario.losses):
            self._sometime(self._lose_one)
        for _ in range(self.scenario.partitions):
            self._sometime(self._cut_one)
        assert self.scheduler.run(_LONGEST_S), "the run does not end"

    def _sometime(self, action: Callable[[], None]) -> None:
        self.scheduler.at(self.scheduler.chance.uniform(0, 3 * self.pace_s * self.steps), action)

    def record(self, event: str, **details: Any) -> None:
        """Record an event of an agent or a worker."""
        self.recorded.append((self.scheduler.now, event, details))

    def events(self, name: str) -> list[dict[str, Any]]:
        """The details of all events of a name."""
        return [details for _, event, details in self.recorded if event == name]

    def log(self, text: str) -> None:
        """Record what happens, for a failing seed."""
        self.events_log.append(f"{self.scheduler.now:8.3f}  {text}")

    # ------------------------------------------------------------------ processes

    def members(self) -> list[Process]:
        """The newest process of each rank of the nodes that have taken part until the end."""
        return [process for process in self.newest().values() if self.nodes[process.node].has_trained]

    def state_of(self, process: Process) -> WorkerState:
        """The state of a process with respect to recovery."""
        return self._workers[process.name].loop.state

    def newest(self) -> dict[tuple[int, int], Process]:
        """The newest process of each node and local rank."""
        return {(process.node, process.local_rank): process for process in self.processes}

    def _start(self, node: int, env: Mapping[str, str]) -> SimulatedProcess:
        local_rank, joins = int(env["LOCAL_RANK"]), environment.REGROUPING in env
        before = self.newest().get((node, local_rank))
        self.scheduler.require(before is None or not before.alive, f"{before} is replaced, but it runs")
        if joins and before is not None and before.port == env[PORT]:
            self.scheduler.require(not before.was_stopped, f"{before} is replaced, but its agent has killed it")
        process = Process(next(self._names), int(env["RANK"]), local_rank, node, env[PORT], joins)
        where = f"{env[PORT]}, regrouping {env.get(environment.REGROUPING, '0')}"
        self.log(f"{process} is started for round {where}")
        self.processes.append(process)
        worker = self._workers[process.name] = Worker(self, process, env)
        worker.spawn(worker.main)
        self._channels[process.name] = SimulatedChannel(partial(self._tell, worker))
        return SimulatedProcess(
            _FIRST_PID + process.name,
            self._channels[process.name],
            partial(self._stop, process),
            lambda: process.end,
        )

    def _stop(self, process: Process, number: int) -> None:
        process.was_stopped = process.was_stopped or process.alive
        self._end(process, -number)

    def _end(self, process: Process, exit_code: int) -> None:
        if process.end is None:
            process.end = End(exit_code, self.scheduler.now)
            for task in process.tasks:
                task.is_dead = True
            if process.group is not None:
                process.group.lose(process.rank, silently=process.node in self._silent)

    def exit(self, process: Process, exit_code: int) -> None:
        """A process exits, which its agent detects after a delay."""
        self._end(process, exit_code)
        self.poll_soon(self.nodes[process.node], 0.02)

    def kill_one(self) -> None:
        """Kill a random process."""
        if living := [process for process in self.newest().values() if process.alive]:
            self.die(self.scheduler.chance.choice(living), "")

    def die(self, process: Process, moment: str) -> None:
        """Kill a process."""
        if process.alive:
            self.log(f"{process} dies at step {process.step} {moment}, {self.state_of(process)}")
            self.exit(process, -signal.SIGKILL)

    def at_moment(self, process: Process, moment: str) -> None:
        """A process has come to a moment of a recovery, and may die there."""
        if self._deaths_at_moments and self.scheduler.chance.random() < 0.15:
            self._deaths_at_moments -= 1
            self.die(process, f"at {moment}")
            self.scheduler.end_here()

    # ------------------------------------------------------------------ agents

    def poll_soon(self, node: SimulatedNode, mean_s: float = 0.005) -> None:
        """Let an agent react after a delay."""
        if node.number not in self._polled:
            self._polled.add(node.number)
            self.scheduler.later(mean_s, partial(self._poll, node))

    def _poll(self, node: SimulatedNode) -> None:
        self._polled.discard(node.number)
        self._changed = False
        if node is not self.nodes[node.number] or node.number in self._silent:
            return
        node.poll(self._others_wait, lambda: self._meet(node))
        if node.is_over:
            self._complete_meeting()
        if self._changed:
            self._poll_others(node)

    def _others_wait(self, admits_nodes: bool) -> bool:
        return any(admits_nodes or self.nodes[number].rank >= 0 for number in self._meeting)

    def _poll_others(self, node: SimulatedNode) -> None:
        for other in self.nodes.values():
            if other is not node:
                self.poll_soon(other)

    def _note_change(self) -> None:
        self._changed = True

    # ------------------------------------------------------------------ nodes that meet, leave and return

    def _meet(self, node: SimulatedNode) -> None:
        """A node waits in a rendezvous, which completes when all do."""
        self._changed = True
        self.log(f"node {node.number} waits for the other nodes")
        self._meeting.add(node.number)
        self._complete_meeting()

    def _complete_meeting(self) -> None:
        present = {number for number, node in self.nodes.items() if not node.is_over and number not in self._gone}
        if not self._meeting or self._meeting != present:
            return
        if any(node.is_over and node.has_trained for node in self.nodes.values()):
            # The run has ended without them.
            for number in present:
                self.nodes[number].is_over, self.nodes[number].has_trained = True, False
            return
        self._round += 1
        self._meeting.clear()
        store = self._stores[self._round] = RoundStore(self._note_change)
        met = [self.nodes[number] for number in sorted(present)]
        sizes = [node.size for node in met]
        for place, node in enumerate(met):
            node.publish_status(store, self._round, place)
        for place, node in enumerate(met):
            self.scheduler.later(0.01, partial(self._begin_round, node, store, self._round, place, sizes))

    def _begin_round(self, node: SimulatedNode, store: RoundStore, number: int, place: int, sizes: list[int]) -> None:
        if node is self.nodes[node.number] and node.number not in self._silent:
            node.begin_round(store, number, place, sizes)
            self.poll_soon(node)

    def _join(self, number: int, size: int) -> None:
        """A node joins the run, or returns to it."""
        if any(node.is_over and node.has_trained for node in self.nodes.values()):
            return
        for left in (self._gone, self._silent, self._cut):
            left.discard(number)
        node = self._add_node(number, size)
        node.meets = True
        self._meet(node)
        self._poll_others(node)
        if self.scheduler.chance.random() < 0.5:
            self.scheduler.later(0.1, self.kill_one)

    def _choose_to_leave(self) -> SimulatedNode | None:
        """A node that may leave; the first one, which hosts the rendezvous, may not."""
        others = [node for number, node in self.nodes.items() if number and not node.is_over and node.rank > 0]
        return self.scheduler.chance.choice(others) if others and not self._silent else None

    def _lose_one(self) -> None:
        """A node is lost with its processes and its arena."""
        if (node := self._choose_to_leave()) is None:
            return
        self.log(f"node {node.number} is lost")
        self._fall_silent(node)
        for process in self.processes:
            if process.node == node.number:
                self._end(process, -signal.SIGKILL)
        node.has_trained = False
        del self.arenas[node.number]
        self.begun.pop(node.number, None)

    def _cut_one(self) -> None:
        """A node is cut off from the others, and returns later."""
        if (node := self._choose_to_leave()) is None:
            return
        self.log(f"node {node.number} is cut off")
        self._cut.add(node.number)
        self._fall_silent(node)
        for process in self.processes:
            if process.node == node.number and process.group is not None:
                process.group.stall()
        self.scheduler.later(0.2, partial(self._find_cut_off, node))

    def _find_cut_off(self, node: SimulatedNode) -> None:
        """A node finds out that it is cut off, and ends; another agent of it returns."""
        node.heartbeat.finding = Partitioned("this node does not reach the others")
        if node.meets or not node.agent.has_started:
            node.end(RendezvousConnectionError("the rendezvous is lost"))
        else:
            node.poll(lambda _: False, lambda: None)
        self.scheduler.later(0.5, partial(self._join, node.number, node.size))

    def _fall_silent(self, node: SimulatedNode) -> None:
        self._silent.add(node.number)
        self._meeting.discard(node.number)
        self.scheduler.later(0.3, partial(self._find_lost, node, self.scheduler.now))

    def _find_lost(self, node: SimulatedNode, since: float) -> None:
        """The other nodes find out that one is lost."""
        if node is self.nodes[node.number]:
            self._gone.add(node.number)
        # Heartbeats are exchanged between the nodes of a round.
        others = [each for each in self.nodes.values() if each is not node and each.round == node.round]
        for other in others:
            if not (other.is_over or other.meets):
                rank, silent_s = other.node_ranks[node.place], self.scheduler.now - since
                other.heartbeat.finding = NodesLost((rank,), f"node {rank} is silent", silent_s)
        if any(other.meets and not other.is_over for other in others):
            # An agent that waits in a rendezvous does nothing else.
            self.scheduler.later(0.05, partial(self._find_lost, node, since))
        self._poll_others(node)
        self._complete_meeting()

    # ------------------------------------------------------------------ messages and connections

    def send(self, process: Process, message: Message) -> None:
        """Send a message of a worker to its agent, which reads it after a delay."""
        if process.alive:
            self._channels[process.name].arrive(message)
            self.poll_soon(self.nodes[process.node])

    def _tell(self, worker: Worker, message: Message) -> None:
        """Send a message of an agent to a worker. Those of a channel keep their order."""
        worker.to_come.append(message)
        self.scheduler.later(0.005, worker.hear_next)

    def worker_store(self, port: int) -> Store:
        """The store that the workers of a round meet in."""
        return self._stores[port].of_workers

    def group(self, key: tuple[int, int, int], world_size: int) -> Group:
        """The connections between the ranks of a generation, by round, regrouping and number."""
        if key not in self._groups:
            self._groups[key] = Group(self.scheduler, f"generation {key}", world_size)
        return self._groups[key]

    def is_cut_off(self, process: Process) -> bool:
        """Whether the node of a process does not reach the others."""
        return process.node in self._cut

    def mark_begun(self, process: Process) -> None:
        """A worker notes that the first step of its generation is committed."""
        self.nodes[process.node].reports.has_begun = True

    # ------------------------------------------------------------------ what a weaker implementation would change

    def ring_of(self, slots: Any, committed: Version | None) -> SlotRing:
        """A ring of slots."""
        return SlotRing(slots, committed)

    # ------------------------------------------------------------------ invariants

    def note_trained(self, process: Process, step: int) -> None:
        """A rank has made a step together with all others."""
        generation = process.generation
        self.scheduler.require(
            generation >= self.trained, f"{process} trains in generation {generation}, others in {self.trained}"
        )
        self.scheduler.require(step == process.step + 1, f"{process} makes step {step} after {process.step}")
        self.trained = generation

    def note_committed(self, process: Process, generation: int, version: Version, history: int) -> None:
        """A rank has learned that a version is committed."""
        self.scheduler.require(
            generation >= self.trained, f"{process} commits {version} of generation {generation} after {self.trained}"
        )
        if version.optimizer_step >= self.committed:
            self.committed, self._history = version.optimizer_step, history

    def note_restored(self, process: Process, version: Version | None, history: int) -> None:
        """A rank resumes from a version, or from the beginning."""
        step = 0 if version is None else version.optimizer_step
        self.log(f"{process} resumes from step {step} in generation {process.generation}")
        self.scheduler.require(
            step >= self.committed, f"step {self.committed} was committed, but {process} resumes from step {step}"
        )
        is_it = step > self.committed or history == self._history
        self.scheduler.require(is_it, f"{process} resumes from another state of step {step} than was committed")
