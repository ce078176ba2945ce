"""The adapter between torch elastic's agent and ours.

torch elastic provides the rendezvous, the assignment of ranks to nodes and the loop that polls the workers. Its methods
are overridden with calls to `NodeAgent`, which makes all decisions.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

from torch.distributed.elastic.agent.server import api
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from lightning_ckptless.internals.torch_internals import forbid_restarts
from lightning_ckptless.membership.agent.agent import Found, NodeAgent
from lightning_ckptless.membership.agent.logs import LogFiles
from lightning_ckptless.membership.agent.worker_context import WorkerContext
from lightning_ckptless.membership.rendezvous.node_membership import NodeMembership
from lightning_ckptless.membership.rendezvous.rounds import Round
from lightning_ckptless.protocol.reconfiguration import MovePlan

_HEALTHY = api.RunResult(state=api.WorkerState.HEALTHY)


class CkptlessAgent(LocalElasticAgent):
    """Torch elastic's agent, which does what a `NodeAgent` decides.

    Args:
        spec: torch elastic's description of the workers.
        logs: where their output goes.
        agent: makes the decisions.
        stop_grace_s: time between SIGTERM and SIGKILL, in seconds, where workers are asked to exit.
    """

    def __init__(self, spec: api.WorkerSpec, logs: LogFiles, agent: NodeAgent, stop_grace_s: float) -> None:
        super().__init__(spec, logs)
        self._agent = agent
        self._membership: NodeMembership = spec.rdzv_handler  # type: ignore[assignment]
        self._stop_grace_s = stop_grace_s
        self._plan = MovePlan((), (), (), 0, "the nodes have not completed a rendezvous yet")

    # ---------------------------------------------------------------- rendezvous

    def _rendezvous(self, worker_group: api.WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        group: Any = worker_group
        group.group_rank = self._plan.node_ranks[group.group_rank]
        self._agent.begin_round(Round.of(worker_group), self._plan)

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: api.WorkerSpec
    ) -> list[api.Worker]:
        """Called when the nodes have joined a round, ordered by address, which is not the order of ranks."""
        self._plan = self._agent.agree(store, group_rank, group_world_size)
        node = self._plan.node_ranks[group_rank]
        workers: list[api.Worker] = super()._assign_worker_ranks(store, node, group_world_size, spec)
        return workers

    # ---------------------------------------------------------------- starting and stopping workers

    def _start_workers(self, _: api.WorkerGroup) -> dict[int, int]:
        def made(context: WorkerContext) -> None:
            self._pcontext = context

        self._agent.start_workers(made)
        return self._agent.workers.pids()

    def _restart_workers(self, worker_group: api.WorkerGroup) -> None:
        """Rendezvous again; workers that train continue if they may."""
        if not self._agent.keeps_training():
            super()._restart_workers(worker_group)
            return
        world_before = worker_group.workers[0].world_size
        self._rendezvous(worker_group)
        if not self._agent.keep_workers(world_before):
            self._stop_workers(worker_group)
            self._start_workers(worker_group)
        self._note_workers(worker_group)

    def _note_workers(self, worker_group: api.WorkerGroup) -> None:
        """Store the process ids of the workers, as torch elastic does when it starts them itself."""
        pids = self._agent.workers.pids()
        for worker in worker_group.workers:
            worker.id = pids[worker.local_rank]
        worker_group.state = api.WorkerState.HEALTHY

    def _stop_workers(self, _: api.WorkerGroup) -> None:
        """Stop running workers. Sidecars continue: others that take their place may follow."""
        self._agent.stop_workers()
        self._close_workers()

    def _shutdown(self, *_: Any, **__: Any) -> None:
        """Stop running workers, whatever signal ended the agent, and the sidecars."""
        grace_s = self._agent.begin_end(sys.exception())
        self._close_workers()
        self._agent.end(grace_s)

    def _close_workers(self) -> None:
        """Ask workers that still run to exit, and kill them after our own grace time."""
        if self._pcontext is not None:
            # Not by torch's own shutdown, which takes no time-out before torch 2.12.
            self._pcontext.close(signal.SIGTERM, self._stop_grace_s)  # type: ignore[arg-type]
        super()._shutdown(signal.SIGTERM)

    def _exit_barrier(self) -> None:
        self._agent.leave()
        super()._exit_barrier()  # type: ignore[no-untyped-call]

    # ---------------------------------------------------------------- watching workers

    def _monitor_workers(self, worker_group: api.WorkerGroup) -> api.RunResult:
        found = self._agent.poll()
        if found is Found.NODES_CHANGED:
            return self._meet_again(worker_group)
        if found is Found.OVER:
            forbid_restarts(self)
        if found is Found.REPLACED:
            self._note_workers(worker_group)
            result = _HEALTHY
        else:
            result = super()._monitor_workers(worker_group)
        if result.state is api.WorkerState.SUCCEEDED:
            self._agent.note_success()
            if not self._agent.may_finish():
                # After a fault on another node, all start again.
                result = _HEALTHY
        elif result.state is not api.WorkerState.HEALTHY:
            return result
        self._membership.admits_nodes = self._agent.admits_nodes
        match self._agent.poll_nodes():
            case Found.NODES_CHANGED:
                return self._meet_again(worker_group)
            case Found.NOT_NEEDED:
                nothing = dict.fromkeys(worker.global_rank for worker in worker_group.workers)
                return api.RunResult(state=api.WorkerState.SUCCEEDED, return_values=nothing)
            case _:
                return result

    def _meet_again(self, worker_group: api.WorkerGroup) -> api.RunResult:
        self._restart_workers(worker_group)
        return _HEALTHY
