"""Detection of network partitions, of this node or of another one.

If this node is partitioned, its workers are killed and the agent ends: the other nodes may continue without it. If
another node falls silent, the remaining nodes rendezvous again, if they are as many as the user requires.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from lightning_ckptless.membership.agent.fault_log import FaultLog
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.events import NodeLost, NodePartitioned, Report
from lightning_ckptless.membership.rendezvous.node_membership import NodeMembership
from lightning_ckptless.membership.rendezvous.rounds import Round
from lightning_ckptless.protocol.node_liveness import Finding, NodesLost, Partitioned
from lightning_ckptless.protocol.reconfiguration import MovePlan


class Heartbeats(Protocol):
    """The heartbeats between this node and the others; see `Heartbeat`."""

    @property
    def finding(self) -> Finding:
        """The latest finding."""

    def begin_round(
        self, store: Any, *, node: int, nodes: int, place: tuple[str, int], worker_store: tuple[str, int]
    ) -> None:
        """Exchange heartbeats among the nodes of a round."""

    def rest(self) -> None:
        """Pause until the next round."""

    def leave(self) -> None:
        """Note that this node has done its part."""

    def close(self) -> None:
        """Stop them."""


class PartitionGuard:
    """Watches the heartbeats between this node and the others.

    Args:
        node: its name.
        heartbeat: tells whether this node or another one is silent.
        membership: this node's membership of the rendezvous.
        faults: this node's faults.
        report: receives events.
        clock: this node's clock.
    """

    def __init__(
        self,
        node: str,
        heartbeat: Heartbeats,
        membership: NodeMembership,
        faults: FaultLog,
        report: Report,
        clock: Clock,
    ) -> None:
        self._node = node
        self._membership = membership
        self._heartbeat = heartbeat
        self._node_ranks: Sequence[int] = ()
        self._faults = faults
        self._report = report
        self._clock = clock

    @property
    def partition_reason(self) -> str:
        """Why this node counts as partitioned; empty if it does not."""
        found = self._heartbeat.finding
        return found.reason if isinstance(found, Partitioned) else ""

    @property
    def has_lost_nodes(self) -> bool:
        """Whether other nodes are lost."""
        return isinstance(self._heartbeat.finding, NodesLost)

    def begin_round(self, rendezvous: Round, plan: MovePlan) -> None:
        """Exchange heartbeats with the nodes of a round.

        Args:
            rendezvous: the round.
            plan: which number each node has.
        """
        self._node_ranks = plan.node_ranks
        store = rendezvous.store.underlying_store
        if rendezvous.nodes < 2 or not isinstance(store, TCPStore):
            # There is no other node, or no network in between: the rendezvous is in a file.
            self._heartbeat.rest()
            return
        self._heartbeat.begin_round(
            rendezvous.store,
            node=rendezvous.node,
            nodes=rendezvous.nodes,
            place=(store.host, store.port),
            worker_store=rendezvous.master,
        )

    def poll(self, *, has_workers: bool) -> str:
        """Return why the nodes have to rendezvous again; empty if they need not.

        Args:
            has_workers: whether workers of this node run; without any, the loss of another node changes nothing.

        Raises:
            RendezvousError: this node is partitioned, or has lost the rendezvous.
        """
        found = self._heartbeat.finding
        if isinstance(found, Partitioned):
            raise RendezvousConnectionError(found.reason)
        if not isinstance(found, NodesLost) or not has_workers:
            return ""
        self._report(NodeLost(self._node, list(found.nodes), found.reason))
        self._faults.lost_at = self._clock.wall() - found.silent_s
        self._membership.expel([self._node_ranks.index(node) for node in found.nodes])
        return found.reason

    def leave(self) -> None:
        """Announce that this node has done its part: other nodes may be busy for longer than it waits for them."""
        self._heartbeat.leave()

    def report_partition(self) -> None:
        """Report that this node was partitioned, if it was.

        Called after the workers have exited: the ledger may be on the lost network.
        """
        if self.partition_reason:
            self._report(NodePartitioned(self._node, self.partition_reason))

    def close(self) -> None:
        """Stop the heartbeats."""
        self._heartbeat.close()
