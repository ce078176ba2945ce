"""An agent whose workers stay in the training loop when nodes leave or join.

The nodes rendezvous again, as torch elastic requires, but the workers are not stopped for it. Joining workers reach the
training loop on their own while the others continue to train. Once they wait there, the training workers receive their
new ranks. One step is lost, and the time in which the ranks meet. `protocol/reconfiguration.py` decides which workers
stay, and when all are relaunched after all.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState

from lightning_ckptless.console import CONSOLE
from lightning_ckptless.membership.agent.agent import CkptlessAgent
from lightning_ckptless.membership.agent.in_place import joining
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.rendezvous.regrouping import Regrouping, Regroupings
from lightning_ckptless.protocol.messages import AwaitRegroup
from lightning_ckptless.protocol.reconfiguration import MovePlan, Standing, plan_move

_AGREE_S = 60.0
_STANDING = "ckptless/standing/{}"
_READY = "ckptless/ready/{}"
_OUTCOME = "ckptless/outcome"
_MEET, _OVER = "meet", "over"


class ReconfiguringAgent(CkptlessAgent):
    """An agent that decides, after each rendezvous, whether its workers may stay."""

    _plan: MovePlan | None = None
    _node_rank = -1
    _has_to_notify = False
    """Whether the workers of this node have yet to be notified that they meet others."""
    _world_before = 0
    _starts_joiners = False
    _has_announced = False

    # ---------------------------------------------------------------- meeting

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        group: Any = worker_group
        plan = self._plan
        assert plan is not None
        group.group_rank = self._node_rank
        self._has_to_notify, self._has_announced, self._lost_at = False, False, plan.lost_at
        # Nodes that stay continue to train among themselves until they meet the others.
        trains = self._node_rank in plan.stay
        self._take_positions(worker_group, plan.stay if trains else range(group.group_world_size))
        if plan.stay:
            self._regroupings = Regroupings(self._meeting_store, group.group_world_size, plan.number)
            self._record("move", node=self._node.name, stay=list(plan.stay), come=list(plan.come), reason=plan.reason)

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Called when the nodes have met, in the order of their addresses, which is not the order of ranks."""
        plan = self._plan = self._agree(store, self._standing(self.get_worker_group()), group_rank, group_world_size)
        self._node_rank = plan.node_ranks[group_rank]
        workers: list[Worker] = super()._assign_worker_ranks(store, self._node_rank, group_world_size, spec)
        return workers

    def _standing(self, worker_group: WorkerGroup) -> Standing:
        if not self.has_started:
            return Standing()
        return Standing(
            trains=self._all_train(),
            node_rank=self._node_rank,
            world_size=worker_group.workers[0].world_size,
            number=self._regroupings.number,
            obstacle=self._in_place.obstacle_to_world_change,
            lost_at=self._lost_at,
        )

    def _all_train(self) -> bool:
        workers = self._current_workers()
        training = workers.inside - workers.ending
        return bool(workers.running_ranks) and set(workers.running_ranks) == set(workers.pids()) == training

    def _agree(self, store: Any, standing: Standing, node: int, nodes: int) -> MovePlan:
        if nodes == 1:
            return plan_move([standing])
        keys = [_STANDING.format(other) for other in range(nodes)]
        try:
            store.set(keys[node], json.dumps(asdict(standing)))
            store.wait(keys, timedelta(seconds=_AGREE_S))
            return plan_move([Standing(**json.loads(store.get(key))) for key in keys])
        except DistError as error:
            # A node has left again. Those that stay would wait for it: its absence is detected, and all nodes
            # rendezvous once more.
            everyone = tuple(range(nodes))
            return MovePlan(everyone, (), everyone, 0, f"the nodes could not agree which of them stay: {error}")

    # ---------------------------------------------------------------- staying

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        """Rendezvous again; workers that train continue if they may."""
        if not self._standing(worker_group).trains:
            super()._restart_workers(worker_group)
            return
        before = worker_group.workers[0].world_size
        self._current_workers().send(AwaitRegroup())
        self._rendezvous(worker_group)
        assert self._plan is not None
        if self._node_rank in self._plan.stay:
            self._stay(worker_group, before, self._plan)
            return
        self._stop_workers(worker_group)
        self._note(worker_group, self._start_workers(worker_group))

    def _stay(self, worker_group: WorkerGroup, before: int, plan: MovePlan) -> None:
        self._has_to_notify, self._world_before = True, before
        self._note(worker_group, self._current_workers().pids())
        by_local = {worker.local_rank: worker for worker in worker_group.workers}
        self._in_place.end_round()
        self._in_place.begin_round(
            self._regroupings,
            lambda stdio: self._start_standby(worker_group, stdio),
            env_of=lambda local_rank: self._worker_env(worker_group, by_local[local_rank]),
        )
        self.recoveries_in_place += 1
        CONSOLE.say(f"{plan.reason}; the world size is {by_local[0].world_size}")

    @staticmethod
    def _note(worker_group: WorkerGroup, pids: Mapping[int, int]) -> None:
        """Store the process ids of the round's workers, as torch elastic does when it starts them itself."""
        for worker in worker_group.workers:
            worker.id = pids[worker.local_rank]
        worker_group.state = WorkerState.HEALTHY

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        plan = self._plan
        if plan is None or not plan.stay or result.state not in (WorkerState.HEALTHY, WorkerState.SUCCEEDED):
            return result
        try:
            if self._node_rank in plan.come:
                return self._end_unmet(worker_group) if self._comes_too_late() else result
            are_apart = self._has_to_notify and not self._bring_together(plan)
        except DistError:
            # The store was lost with its node: the rendezvous detects that.
            return result
        if are_apart:
            # The other nodes are in their rendezvous, and cannot finish without this one.
            self._restart_workers(worker_group)
            return RunResult(state=WorkerState.HEALTHY)
        return result

    def _bring_together(self, plan: MovePlan) -> bool:
        """Notify workers that stay once joining ones wait at the loop; returns whether all nodes do the same."""
        all_train = self._all_train()
        if all_train and not self._are_ready(plan):
            return True
        settled = self._settle_on(_MEET if all_train else _OVER)
        self._has_to_notify = False
        if all_train and settled == _MEET:
            fault = self._change(self._world_before)
            self._record_fault(fault)
            self._positions.peers = plan.stay + plan.come
            self._in_place.regroup(self._current_workers(), plan.number, fault)
            self._lost_at = 0.0
        return all_train or settled == _OVER

    def _may_end(self) -> bool:
        """Whether workers may leave: not when a meeting with joining nodes is settled, of which they are notified."""
        try:
            return not self._has_to_notify or self._settle_on(_OVER) == _OVER
        except DistError:
            # The store was lost with its node: the rendezvous detects that.
            return False

    def _settle_on(self, outcome: str) -> str:
        """Return the outcome of the round, set by the first node whose workers can meet others or have left."""
        settled: bytes = self._meeting_store.compare_set(_OUTCOME, "", outcome)
        return settled.decode()

    def _comes_too_late(self) -> bool:
        """Announce that all workers wait at the loop; returns whether the nodes they join have left it meanwhile."""
        if self._in_place.trains:
            return False
        if not self._has_announced and self._in_place.waiting_at_loop >= set(self._current_workers().pids()):
            self._meeting_store.set(_READY.format(self._node_rank), "1")
            self._has_announced = True
        return bool(self._meeting_store.check([_OUTCOME])) and self._meeting_store.get(_OUTCOME).decode() == _OVER

    def _end_unmet(self, worker_group: WorkerGroup) -> RunResult:
        """Stop workers that have trained nothing, with the outcome of a run that has completed."""
        workers = self._current_workers()
        self._record("joined_too_late", node=self._node.name, pids=list(workers.pids().values()))
        CONSOLE.say(
            f"the other nodes left the training loop before this node's workers ({len(workers.pids())}) reached it; "
            "stopping them: they have trained no step"
        )
        workers.stop(signal.SIGKILL, 0)
        self.exit_code = 0
        nothing = dict.fromkeys(worker.global_rank for worker in worker_group.workers)
        return RunResult(state=WorkerState.SUCCEEDED, return_values=nothing)

    def _change(self, world_size: int) -> FaultReport:
        at = time.time()
        return FaultReport(None, None, None, None, self._lost_at or at, at, at, len(self.faults) + 1, world_size)

    def _are_ready(self, plan: MovePlan) -> bool:
        return not plan.come or bool(self._meeting_store.check([_READY.format(node) for node in plan.come]))

    # ---------------------------------------------------------------- coming

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        plan = self._plan
        self._starts_joiners = plan is not None and bool(plan.stay) and self._node_rank in plan.come
        try:
            return super()._start_workers(worker_group)
        finally:
            # The loss has been reported: what comes next does not date from it.
            self._starts_joiners, self._lost_at = False, 0.0

    def _worker_env(self, worker_group: WorkerGroup, worker: Worker) -> dict[str, str]:
        env = super()._worker_env(worker_group, worker)
        if not self._starts_joiners or self._plan is None:
            return env
        return env | joining(Regrouping(self._plan.number, self._change(worker.world_size)))
