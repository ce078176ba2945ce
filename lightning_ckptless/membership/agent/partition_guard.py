"""An agent that detects a network partition: of its own node, or of another one."""

from __future__ import annotations

import time
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from lightning_ckptless.console import CONSOLE
from lightning_ckptless.membership.agent.agent import CkptlessAgent, Node, Record
from lightning_ckptless.membership.agent.logs import LogFiles
from lightning_ckptless.membership.agent.node_liveness import Heartbeat
from lightning_ckptless.membership.agent.reconfiguration import ReconfiguringAgent
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.protocol.node_liveness import AllAlive, Bound, CutOff, NodesLost


class PartitionGuardAgent(ReconfiguringAgent):
    """An agent with heartbeats between nodes.

    If its node is partitioned, its workers are killed and the agent ends: the other nodes may continue without it. If
    another node falls silent, the remaining nodes rendezvous again, with as many as the user allows.

    Args:
        spec, node, parent, logs_specs, record, after: see `CkptlessAgent`.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        node: Node,
        parent: ForkServer,
        logs_specs: LogFiles,
        record: Record,
        after: CkptlessAgent | None = None,
    ) -> None:
        super().__init__(spec, node, parent, logs_specs, record, after)
        handler: Any = spec.rdzv_handler
        settings = handler.settings
        self._heartbeat = Heartbeat(
            Bound(settings.keep_alive_interval.total_seconds(), settings.keep_alive_max_attempt)
        )
        self._why_stopped = ""

    @property
    def partition_reason(self) -> str:
        """Why this node counts as partitioned; empty where it does not."""
        found = self._heartbeat.finding
        return found.reason if isinstance(found, CutOff) else ""

    def close(self) -> None:
        """Release the agent's resources."""
        self._heartbeat.close()
        super().close()

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        group: Any = worker_group
        store = group.store.underlying_store
        if group.group_world_size < 2 or not isinstance(store, TCPStore):
            # There is no other node, or no network in between: they rendezvous in a file.
            self._heartbeat.rest()
            return
        self._heartbeat.begin_round(
            group.store,
            node=group.group_rank,
            nodes=group.group_world_size,
            place=(store.host, store.port),
            worker_store=(group.master_addr, group.master_port),
        )

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        # Where all nodes end with the same error, one that has already ended is not a lost node.
        found = AllAlive() if self._loop_end.is_failing else self._heartbeat.finding
        if isinstance(found, CutOff):
            raise RendezvousConnectionError(found.reason)
        if isinstance(found, NodesLost) and self._current_workers().running:
            self._record("node_lost", node=self._node.name, lost=list(found.nodes), reason=found.reason)
            CONSOLE.say(f"{found.reason}; remaining nodes are re-rendezvousing")
            self._why_stopped, self._lost_at = found.reason, time.time() - found.silent_s
            # Unless the run completes after all, e.g. where the other nodes have ended it.
            self.exit_code = 1
            self._restart_workers(worker_group)
            return RunResult(state=WorkerState.HEALTHY)
        return super()._monitor_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._stop_workers(worker_group)
        if self._why_stopped:
            self._reason, self._why_stopped = self._why_stopped, ""

    def _exit_barrier(self) -> None:
        # Other nodes may be busy for longer than this node waits for them.
        self._heartbeat.leave()
        super()._exit_barrier()  # type: ignore[no-untyped-call]

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        super()._shutdown(*args, **kwargs)
        if self.partition_reason:
            # After the workers have exited: the ledger may be on the network that is lost.
            self._record("node_cut", node=self._node.name, reason=self.partition_reason)
