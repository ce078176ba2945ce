"""The agent of one node: its parts, and the order in which they act.

It knows nothing of torch elastic's agent, which calls it through `elastic_agent.py`. Each part has one subject and owns
its state; what two parts share is passed to both.

| Part | Subject |
|---|---|
| `WorkerStarter` | starts workers, and gives each process its environment |
| `WorkerGroup` | the processes of this node: messages, exits, replacements |
| `Recovery` | decides how to recover from the loss of workers, and does it |
| `InPlaceRecovery` | replaces lost ranks while the survivors stay |
| `Draining` | hands ranks over to prepared processes, or lets the node leave |
| `Reconfiguration` | lets workers stay when nodes leave or join |
| `PartitionGuard` | notices that this node or another one is partitioned |
| `HangWatch`, `LateExits` | kill workers that hang, or that have failed and do not exit |
| `LoopEnd` | lets the workers of all nodes leave the training loop together |
| `Notices` | learns that this node is about to be taken away |
| `HeldMemory`, `Sidecars` | what the agent holds for its workers |
| `RunRequests` | takes requests from other terminals |
| `RewindRequests` | passes rewind requests on to the workers |
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.elastic.rendezvous.api import RendezvousError

from lightning_ckptless.console import Bar
from lightning_ckptless.errors import TimeLimitError
from lightning_ckptless.membership.agent.departure import DepartedError, Departure
from lightning_ckptless.membership.agent.draining import Draining
from lightning_ckptless.membership.agent.fault_log import FaultLog
from lightning_ckptless.membership.agent.hang_watch import HangWatch, LateExits
from lightning_ckptless.membership.agent.held_memory import HeldMemory
from lightning_ckptless.membership.agent.in_place import InPlaceRecovery
from lightning_ckptless.membership.agent.loop_end import LoopEnd
from lightning_ckptless.membership.agent.notices import Notices
from lightning_ckptless.membership.agent.partition_guard import PartitionGuard
from lightning_ckptless.membership.agent.positions import Positions
from lightning_ckptless.membership.agent.reconfiguration import JoinProgress, Reconfiguration, agree, publish_status
from lightning_ckptless.membership.agent.recovery import Recovery
from lightning_ckptless.membership.agent.rewind_requests import RewindRequests
from lightning_ckptless.membership.agent.run_requests import RunRequests
from lightning_ckptless.membership.agent.settings import NodeRun, NodeSettings
from lightning_ckptless.membership.agent.signals import AskedToEnd
from lightning_ckptless.membership.agent.starting import Starter
from lightning_ckptless.membership.agent.worker_context import WorkerContext
from lightning_ckptless.membership.agent.workers import WorkerGroup
from lightning_ckptless.membership.channel.agent_channel import FromWorker
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.events import (
    EventSink,
    JoinedTooLate,
    NodesMoved,
    Relaunched,
    WorkersSpawned,
    WorldChanged,
)
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.forkserver.sidecar import END_GRACE_S, Sidecars
from lightning_ckptless.membership.rendezvous.regrouping import Regroupings
from lightning_ckptless.membership.rendezvous.rounds import Round
from lightning_ckptless.protocol.draining import DrainAction
from lightning_ckptless.protocol.messages import AwaitRegroup, EnteredLoop, LeftLoop, NodeUnfit
from lightning_ckptless.protocol.reconfiguration import MovePlan, NodeStatus
from lightning_ckptless.protocol.recovery import Rung
from lightning_ckptless.protocol.wording import name_ranks

_WAIT_S = 0.1


class Found(Enum):
    """What a poll of the workers has found, for torch elastic."""

    NOTHING_NEW = auto()
    """Workers run or have exited; failed ones are to be restarted."""
    REPLACED = auto()
    """Lost workers have been replaced or are not needed, or the node is leaving: their exits are no failures."""
    OVER = auto()
    """Workers have failed, and none is restarted."""
    NODES_CHANGED = auto()
    """The nodes must rendezvous again."""
    NOT_NEEDED = auto()
    """The workers joined too late and were stopped, which counts as success."""


@dataclass(frozen=True, slots=True)
class _RoundParts:
    """The parts of an agent that belong to one round of the rendezvous."""

    rendezvous: Round
    plan: MovePlan
    regroupings: Regroupings
    positions: Positions
    loop_end: LoopEnd
    reconfiguration: Reconfiguration
    departure: Departure


@dataclass(frozen=True, slots=True)
class AgentParts:
    """The parts of an agent that last for all rounds; see the table above.

    Args:
        folder: the agent's folder, in which workers leave their reports.
    """

    folder: Path
    starter: Starter
    in_place: InPlaceRecovery
    draining: Draining
    faults: FaultLog
    recovery: Recovery
    guard: PartitionGuard
    hangs: HangWatch
    late_exits: LateExits
    memory: HeldMemory
    sidecars: Sidecars
    rewinds: RewindRequests
    requests: RunRequests
    notices: Notices


class NodeAgent:
    """The agent of one node, for as long as its rendezvous exists.

    Args:
        settings: the node's settings.
        run: the run on this node, which earlier agents may have begun.
        parts: the agent's parts.
        events: receives what happens.
        clock: this node's clock.
    """

    def __init__(
        self, settings: NodeSettings, run: NodeRun, parts: AgentParts, events: EventSink, clock: Clock
    ) -> None:
        self._settings = settings
        self._run = run
        self._folder = parts.folder
        self._starter = parts.starter
        self._in_place = parts.in_place
        self._draining = parts.draining
        self._faults = parts.faults
        self._recovery = parts.recovery
        self._guard = parts.guard
        self._hangs = parts.hangs
        self._late_exits = parts.late_exits
        self._memory = parts.memory
        self._sidecars = parts.sidecars
        self._rewinds = parts.rewinds
        self._requests = parts.requests
        self._notices = parts.notices
        self._events = events
        self._clock = clock
        self._started_at = clock.monotonic()
        self._stop_reason = ""
        self._departure: Departure | None = None
        self._workers: WorkerGroup | None = None
        self._round: _RoundParts | None = None

    @property
    def has_started(self) -> bool:
        """Whether its workers have been started."""
        return self._workers is not None

    @property
    def workers(self) -> WorkerGroup:
        """The workers of this node; they have been started."""
        assert self._workers is not None
        return self._workers

    @property
    def _current(self) -> _RoundParts:
        assert self._round is not None
        return self._round

    @property
    def partition_reason(self) -> str:
        """Why this node counts as partitioned; empty if it does not."""
        return self._guard.partition_reason

    # ---------------------------------------------------------------- rendezvous

    def publish_status(self, store: object, node: int) -> None:
        """Publish the status of this node for a new round.

        Args:
            store: the agents' store for the round.
            node: place of this node in the order in which the nodes joined the round.

        Raises:
            DistError: the store is lost.
        """
        publish_status(store, self._standing(), node)

    def agree(self, store: object, node: int, nodes: int) -> MovePlan:
        """Decide with the agents of all nodes whose workers stay; waits until all have published their status.

        Args:
            store: the agents' store for the round.
            node: place of this node in the order in which the nodes joined the round.
            nodes: how many there are.
        """
        return agree(store, self._standing(), node, nodes)

    def _standing(self) -> NodeStatus:
        if not self.has_started:
            return NodeStatus()
        current = self._current
        return NodeStatus(
            trains=self.workers.all_train and not self._in_place.awaits_replacement,
            ends=bool(self.workers.past_loop or self.workers.ending),
            node_rank=current.rendezvous.node,
            world_size=current.rendezvous.world_size,
            number=current.regroupings.number,
            obstacle=self._in_place.obstacle_to_world_change,
            lost_at=self._faults.lost_at,
        )

    def begin_round(self, rendezvous: Round, plan: MovePlan) -> None:
        """Begin a round of the rendezvous.

        Args:
            rendezvous: the round.
            plan: what the nodes have agreed on.
        """
        node, store = rendezvous.node, rendezvous.connect_worker_store()
        self._faults.lost_at = plan.lost_at
        # Nodes that stay continue to train among themselves until the others are ready.
        peers: Collection[int] = plan.stay if node in plan.stay else range(rendezvous.nodes)
        positions = Positions(store, node, peers, rendezvous.ranks, self._events.report)
        self._hangs.begin_round(positions)
        self._round = _RoundParts(
            rendezvous,
            plan,
            Regroupings(store, rendezvous.nodes, plan.number if plan.stay else 0),
            positions,
            LoopEnd(self._hangs, positions, self._clock),
            Reconfiguration(plan, node, store, self._in_place, self._faults, positions, self._departure),
            Departure(rendezvous.store, self._clock, is_shared=rendezvous.nodes > 1),
        )
        self._departure = None
        if plan.stay:
            move = NodesMoved(self._settings.name, list(plan.stay), list(plan.come), plan.reason)
            self._events.report(move)
        self._guard.begin_round(rendezvous, plan)

    def keeps_training(self) -> bool:
        """Whether the workers continue to train while the nodes rendezvous; notifies them if so."""
        if not self._standing().trains:
            return False
        if self._current.departure.why():
            self._departure = self._current.departure
        self.workers.send(AwaitRegroup())
        return True

    def keep_workers(self, world_before: int) -> bool:
        """Keep the workers in the new round, if they may stay; returns whether they may.

        Args:
            world_before: number of ranks before the round.
        """
        current = self._current
        if not current.reconfiguration.stays:
            return False
        current.reconfiguration.keep_workers(world_before)
        # Nothing was stopped: a later relaunch has another reason.
        self._stop_reason = ""
        self._in_place.end_round()
        self._in_place.begin_round(current.regroupings, self._start_standby, env_of=self._env_of)
        self._run.recoveries_in_place += 1
        self._events.report(WorldChanged(current.plan.reason, current.rendezvous.world_size))
        return True

    @property
    def admits_nodes(self) -> bool:
        """Whether nodes may join the run: not while it ends, which would stop workers that are about to finish."""
        return not self.workers.are_done

    # ---------------------------------------------------------------- starting workers

    def start_workers(self, made: Callable[[WorkerContext], None]) -> None:
        """Start all workers of the round.

        Args:
            made: called with the workers before they start.
        """

        def keep(context: WorkerContext) -> None:
            self._workers = context.workers
            made(context)

        current, rendezvous = self._current, self._current.rendezvous
        self._recovery.begin_round(rendezvous.ranks)
        try:
            regrouping = current.reconfiguration.joined_regrouping(rendezvous.world_size)
            workers = self._starter.start(rendezvous, keep, regrouping)
            self._run.starts += 1
            self._in_place.begin_round(current.regroupings, self._start_standby)
            pids = workers.pids()
            by_rank = {rank: pids[local_rank] for local_rank, rank in rendezvous.ranks.items()}
            name, host = self._settings.name, self._settings.host
            self._events.report(WorkersSpawned(name, rendezvous.world_size, by_rank, host, os.getpid(), self._folder))
            if self._run.relaunches:
                self._report_relaunch(rendezvous.world_size)
        finally:
            # The loss has been reported: the next fault does not date back to it.
            self._faults.lost_at = 0.0

    def _report_relaunch(self, world_size: int) -> None:
        fault = self._run.faults[-1]
        count = str(self._run.history) if fault.rank is not None else "not counted as a recovery"
        self._events.report(Relaunched(self._settings.name, fault, self._recovery.reason, world_size, count))

    def _start_standby(self, stdio: list[int]) -> Process:
        return self._starter.start_standby(self._current.rendezvous, self.workers, stdio)

    def _env_of(self, local_rank: int) -> dict[str, str]:
        return self._starter.env_of(self._current.rendezvous, local_rank)

    # ---------------------------------------------------------------- watching workers

    def poll(self) -> Found:
        """Wait until something happens, for a short time, and react.

        Raises:
            RendezvousConnectionError: this node is partitioned.
            TimeLimitError: the run has exceeded its time limit.
            UnfitNodeError: this node cannot continue.
            DepartedError: this node was drained, and has left the run.
            AskedToEnd: this node is about to be taken away, and nothing can take its work.
        """
        workers, loop_end = self.workers, self._current.loop_end
        if self._draining.leaving is not None:
            return self._leave(workers)
        # Where all nodes end with the same error, one that has already ended is not a lost node.
        if not loop_end.is_failing and (reason := self._guard.poll(has_workers=bool(workers.running))):
            # Unless the run completes after all, e.g. where the other nodes have ended it.
            self._stop_reason, self._run.exit_code = reason, 1
            return Found.NODES_CHANGED
        if reason := self._current.departure.news():
            self._stop_reason = reason
            return Found.NODES_CHANGED
        workers.watch(loop_end.pause_s(_WAIT_S))
        self._enforce_time_limit()
        received = workers.receive()
        self._receive(received)
        self._in_place.follow(workers)
        self._current.reconfiguration.follow()
        has_recovered = bool(self._run.faults or self._in_place.number)
        self._kill_stuck(workers, has_recovered=has_recovered)
        rung = self._recover(workers)
        if rung is Rung.IN_PLACE or (rung is Rung.RELAUNCH and self._current.reconfiguration.is_too_late):
            return Found.REPLACED
        if rung is None and (reason := self._why_incomplete()):
            self._stop_reason = reason
            return Found.NODES_CHANGED
        loop_end.maintain(
            workers,
            number=self._in_place.number,
            may_end=self._current.reconfiguration.may_end,
            has_recovered=has_recovered,
        )
        if self._is_leaving_now(workers):
            return Found.REPLACED
        self._in_place.maintain_standbys()
        self._starter.maintain_successor(received, workers, trains=self._in_place.trains)
        return Found.OVER if rung is Rung.END else Found.NOTHING_NEW

    def _why_incomplete(self) -> str:
        """Why a regrouping that is under way cannot be completed; empty if it can."""
        past = tuple(self._current.rendezvous.ranks[local_rank] for local_rank in self.workers.past_loop)
        if not past or not self._in_place.is_regrouping:
            return ""
        return f"not in place: {name_ranks(past)} left the training loop after the last step"

    def _is_leaving_now(self, workers: WorkerGroup) -> bool:
        """Handle requests and notices; returns whether this node is leaving.

        Raises:
            AskedToEnd: it is about to be taken away, and nothing can take its work: the run ends as on SIGTERM.
        """
        rendezvous, departure = self._current.rendezvous, self._current.departure
        self._requests.poll(rendezvous, departure, workers)
        if self._draining.leaving is None:
            self._draining.poll(rendezvous, departure, workers)
        if self._draining.leaving is None and (reason := self._notices.take()):
            wait_s = self._settings.finish_grace_s
            plan = self._draining.drain_node(rendezvous.node, reason, rendezvous, departure, wait_s=wait_s)
            if plan.action is DrainAction.REFUSE:
                raise AskedToEnd(signal.SIGTERM)
        if self._draining.leaving is not None:
            # From here on the others exchange heartbeats without this node.
            self._guard.leave()
        return self._draining.leaving is not None

    def _leave(self, workers: WorkerGroup) -> Found:
        """Watch workers that train until they are handed over."""
        assert self._draining.leaving is not None
        workers.watch(_WAIT_S)
        self._receive(workers.receive())
        self._kill_stuck(workers, has_recovered=bool(self._run.faults or self._in_place.number))
        if self._current.regroupings.news() is not None:
            self._draining.leaving.give_up(workers)
        self._draining.leaving.poll(workers)
        return Found.REPLACED

    def poll_nodes(self) -> Found:
        """Bring workers that stay and workers that join together; called after `poll` unless workers have failed."""
        workers = self.workers
        match self._current.reconfiguration.poll(workers):
            case JoinProgress.UNDER_WAY:
                return Found.NOTHING_NEW
            case JoinProgress.WITHOUT_US:
                return Found.NODES_CHANGED
            case JoinProgress.TOO_LATE:
                pids = list(workers.pids().values())
                self._events.report(JoinedTooLate(self._settings.name, pids))
                workers.stop(signal.SIGKILL, 0)
                self.note_success()
                return Found.NOT_NEEDED

    def note_success(self) -> None:
        """Record that all workers have succeeded."""
        self._run.exit_code = 0

    def may_finish(self) -> bool:
        """Record that this node is done; returns whether no other node may need its workers again, after a fault."""
        return self._guard.has_lost_nodes or self._current.positions.all_have_finished()

    def _receive(self, received: Sequence[FromWorker]) -> None:
        for _, message, _ in received:
            if isinstance(message, EnteredLoop):
                self._events.expect_bar(message.bar)
            elif isinstance(message, LeftLoop):
                self._events.expect_bar(Bar.NONE)
        self._starter.receive(received)
        self._in_place.receive(received)
        self._sidecars.maintain(received)
        for message in self._sidecars.receive():
            if isinstance(message, NodeUnfit):
                self._draining.note_unfit(message.finding)
        self._memory.maintain(received)
        self._rewinds.receive(received)
        self._hangs.receive(received)
        self._hangs.limit_s = self._in_place.hang_timeout_s

    def _kill_stuck(self, workers: WorkerGroup, *, has_recovered: bool) -> None:
        """Kill workers that have failed and do not exit, that hang, or that hold up a regroup."""
        self._late_exits.poll(workers)
        hang = self._hangs.poll(workers) or self._in_place.poll()
        loop_end = self._current.loop_end
        if hang is not None and not loop_end.explains_hang(workers, has_recovered=has_recovered):
            self._hangs.kill(hang, workers)
            return
        late = self._hangs.poll_regroup(self._in_place.regroup_status(workers), workers)
        # These ranks were already killed and are about to exit.
        if late is not None and not any(workers.hang_reason(rank) for rank in late.ranks):
            self._hangs.kill(late, workers)

    def _recover(self, workers: WorkerGroup) -> Rung | None:
        lost = workers.lost()
        for local_rank in lost:
            self._in_place.show_output_of(local_rank)
        if not lost:
            return None
        current = self._current
        return self._recovery.recover(current.rendezvous, workers, lost, self._env_of, current.reconfiguration.obstacle)

    def _enforce_time_limit(self) -> None:
        limit_s = self._settings.time_limit_s
        if limit_s is not None and self._clock.monotonic() - self._started_at > limit_s:
            raise TimeLimitError(f"the run did not end within its time limit of {limit_s:.0f} s; stopping its workers")

    # ---------------------------------------------------------------- stopping workers

    def stop_workers(self) -> None:
        """Stop the workers that run, for a new round."""
        workers = self.workers
        self._in_place.end_round()
        if workers.running or not workers.failed():
            # No worker failed: nodes joined or left. The state is in the arenas, so there is nothing to wait for.
            at = self._clock.wall()
            workers.stop(signal.SIGKILL, 0)
            self._faults.add(self._faults.of_change(self._current.rendezvous.world_size, at))
            self._recovery.reason = "nodes have joined or left"
        if self._stop_reason:
            self._recovery.reason, self._stop_reason = self._stop_reason, ""

    def begin_end(self, cause: BaseException | None) -> float:
        """Prepare the end of the workers; returns how long sidecars may take afterwards, in seconds.

        Args:
            cause: exception that ends the agent; None if the workers have ended.
        """
        self._in_place.end_round()
        workers = self._workers
        if isinstance(cause, RendezvousError | DistError) and workers is not None:
            # The other nodes use another endpoint, and the state is in the arenas.
            workers.stop(signal.SIGKILL, 0)
        if isinstance(cause, AskedToEnd) and cause.number == signal.SIGTERM and workers is not None:
            return workers.finish(self._settings.finish_grace_s)
        return END_GRACE_S if cause is None or isinstance(cause, DepartedError) else 0.0

    def end(self, grace_s: float) -> None:
        """Stop the other processes of the run; the workers have exited.

        Args:
            grace_s: how long sidecars may take, in seconds.
        """
        self._sidecars.end(grace_s)
        self._guard.report_partition()

    def leave(self) -> None:
        """Announce to the other nodes that this one has done its part."""
        self._guard.leave()

    def note_lost_rendezvous(self) -> None:
        """Record that the rendezvous is lost: the next agent of this node continues elsewhere."""
        self._faults.add_lost_rendezvous(self._current.rendezvous.world_size)

    def close(self) -> None:
        """Release the resources of this agent."""
        self._notices.close()
        self._draining.close("" if self._draining.leaving is None else self._draining.leaving.summary)
        self._guard.close()
        self._starter.close()
