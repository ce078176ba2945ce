"""Draining on this node: ranks are handed over at a committed step, or the whole node leaves.

    request -> standby wanted -> standby ready: `HandOver` to the rank -> all ranks stop -> it exits -> replaced

A rank is drained on request, or as a straggler; a node on request, on a notice, or when it fails its health check. A
fault in between is recovered from as usual. If it takes the standby, or if another regrouping begins, the rank is asked
again once a standby is ready. If it takes the rank itself, there is nothing left to drain. How a node leaves is
described in `departure.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lightning_ckptless.membership.agent.departure import Departure, Leaving
from lightning_ckptless.membership.agent.in_place import InPlaceRecovery, WorkerControl
from lightning_ckptless.membership.agent.straggler_watch import StragglerWatch
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.drain_events import Drained, DrainGivenUp, DrainPlanned
from lightning_ckptless.membership.events import Report
from lightning_ckptless.membership.rendezvous.node_membership import NodeMembership
from lightning_ckptless.membership.rendezvous.rounds import Round
from lightning_ckptless.membership.requests import DrainRequest, TakenRequest
from lightning_ckptless.protocol.draining import (
    DrainAction,
    DrainPlan,
    NodeSituation,
    RankSituation,
    plan_node_drain,
    plan_rank_drain,
)
from lightning_ckptless.protocol.messages import HandOver

_MEET_S = 600.0
"""Longest wait of a leaving node for the others: the script of a node that takes its place may take long."""
ON_REQUEST = "requested with `ckptless drain`"


class DrainableWorkers(WorkerControl, Protocol):
    """What draining needs of this node's workers; see `WorkerGroup`."""

    @property
    def all_train(self) -> bool:
        """Whether all workers run, are in the training loop and have not been allowed to leave it."""

    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""


@dataclass(slots=True)
class _Drain:
    """A rank that is being drained.

    Args:
        rank: the rank.
        pid: process that has it.
        reason: why it is drained.
        taken: the request, to be answered; None if no answer is expected.
        asked_in: regrouping in which the process was asked to hand over; None if it was not.
    """

    rank: int
    pid: int
    reason: str
    taken: TakenRequest | None
    asked_in: int | None = None


class Draining:
    """Drains the ranks of one node, or the node.

    Args:
        node: its name.
        least_nodes: how many nodes the run needs.
        endpoints: how many rendezvous endpoints it has.
        membership: this node's membership of the rendezvous.
        stragglers: finds stragglers among the workers.
        in_place: the recoveries in place of this node.
        report: receives events.
        clock: this node's clock.

    Attributes:
        leaving: the last part of this node's life; None until it leaves.
    """

    def __init__(
        self,
        node: str,
        least_nodes: int,
        endpoints: int,
        membership: NodeMembership,
        stragglers: StragglerWatch,
        in_place: InPlaceRecovery,
        report: Report,
        clock: Clock,
    ) -> None:
        self.leaving: Leaving | None = None
        self._node = node
        self._least_nodes = least_nodes
        self._endpoints = endpoints
        self._membership = membership
        self._stragglers = stragglers
        self._in_place = in_place
        self._report = report
        self._clock = clock
        self._unfit = ""
        self._refused = ""
        self._drains: dict[int, _Drain] = {}
        self._node_request: TakenRequest | None = None

    def poll(self, rendezvous: Round, departure: Departure, workers: DrainableWorkers) -> None:
        """Drain an unfit node or slow ranks, and hand over ranks whose replacement is ready.

        Args:
            rendezvous: the round.
            departure: a node's departure from the round.
            workers: this node's workers.
        """
        if self._in_place.trains:
            self._drain_unfit(rendezvous, departure)
            self._drain_straggler(rendezvous, workers)
        pids = workers.pids()
        for local_rank, drain in list(self._drains.items()):
            if pids[local_rank] != drain.pid:
                self._give_up(local_rank, "its process was lost before it handed over, and was replaced")
            elif why_not := self._in_place.why_no_standby:
                self._give_up(local_rank, f"no replacement could be prepared: {why_not}")
        self._in_place.wanted_for_drains = len(self._drains)
        for local_rank, drain in list(self._drains.items())[: self._in_place.ready_standbys]:
            if drain.asked_in != self._in_place.number and workers.all_train:
                drain.asked_in = self._in_place.number
                workers.send_to(local_rank, HandOver(drain.reason))

    # ------------------------------------------------------------------ causes

    def concerns(self, request: DrainRequest, rendezvous: Round) -> bool:
        """Whether this agent answers a request now. Exactly one agent refuses a rank or node that does not exist."""
        if not self._in_place.trains and rendezvous.world_size > 1:
            return False
        is_first = rendezvous.node == 0
        if request.rank is not None:
            return request.rank in rendezvous.ranks.values() or (is_first and request.rank >= rendezvous.world_size)
        assert request.node is not None
        return request.node == rendezvous.node or (is_first and request.node >= rendezvous.nodes)

    def heed(
        self,
        taken: TakenRequest,
        asked: DrainRequest,
        rendezvous: Round,
        departure: Departure,
        workers: DrainableWorkers,
    ) -> None:
        """Carry out a request, or refuse it.

        Args:
            taken: the request, which is answered.
            asked: the request.
            rendezvous: the round.
            departure: a node's departure from the round.
            workers: this node's workers.
        """
        if asked.rank is not None:
            plan = self.drain_rank(asked.rank, ON_REQUEST, rendezvous, workers, taken)
        else:
            assert asked.node is not None
            plan = self.drain_node(asked.node, ON_REQUEST, rendezvous, departure, taken=taken)
        if plan.action is DrainAction.REFUSE:
            taken.answer(accepted=False, reason=plan.reason)

    def note_unfit(self, finding: str) -> None:
        """Record that this node has failed its health check.

        Args:
            finding: what is wrong with it.
        """
        self._unfit = f"the node failed its health check: {finding}"

    def _drain_unfit(self, rendezvous: Round, departure: Departure) -> None:
        if self._unfit:
            reason, self._unfit = self._unfit, ""
            self.drain_node(rendezvous.node, reason, rendezvous, departure)

    def _drain_straggler(self, rendezvous: Round, workers: DrainableWorkers) -> None:
        options, is_draining = self._in_place.stragglers, bool(self._drains)
        if (plan := self._stragglers.poll(workers, rendezvous.ranks, options, is_draining=is_draining)) is not None:
            self.drain_rank(plan.rank, plan.reason, rendezvous, workers)

    # ------------------------------------------------------------------ a rank

    def drain_rank(
        self,
        rank: int,
        reason: str,
        rendezvous: Round,
        workers: DrainableWorkers,
        taken: TakenRequest | None = None,
    ) -> DrainPlan:
        """Drain a rank of this node if possible.

        Args:
            rank: the rank.
            reason: why.
            rendezvous: the round.
            workers: this node's workers.
            taken: the request, which is answered once the rank is drained; None if no answer is expected.
        """
        plan = plan_rank_drain(
            RankSituation(
                rank=rank,
                world_size=rendezvous.world_size,
                under_way=frozenset(drain.rank for drain in self._drains.values()),
                in_place=self._in_place.is_wanted,
                obstacle=self._in_place.obstacle,
                standbys=self._in_place.ready_standbys - len(self._drains),
            )
        )
        if plan.action is DrainAction.REPLACE:
            local_rank = next(local_rank for local_rank, its_rank in rendezvous.ranks.items() if its_rank == rank)
            self._drains[local_rank] = _Drain(rank, workers.pids()[local_rank], reason, taken)
        self._report(DrainPlanned(self._node, reason, plan.reason, str(plan.action), rank))
        return plan

    def note(self, local_rank: int, done: Drained) -> None:
        """Report that a rank was handed over.

        Args:
            local_rank: the rank.
            done: what was done.
        """
        self._report(done)
        drain = self._drains.pop(local_rank, None)
        if drain is not None and drain.taken is not None:
            drain.taken.answer(accepted=True, reason=done.summary)

    def _give_up(self, local_rank: int, why: str) -> None:
        drain = self._drains.pop(local_rank)
        reason = f"rank {drain.rank} was not handed over: {why}"
        self._report(DrainGivenUp(self._node, drain.rank, reason))
        if drain.taken is not None:
            drain.taken.answer(accepted=False, reason=reason)

    # ------------------------------------------------------------------ the node

    def drain_node(
        self,
        node: int,
        reason: str,
        rendezvous: Round,
        departure: Departure,
        *,
        wait_s: float = _MEET_S,
        taken: TakenRequest | None = None,
    ) -> DrainPlan:
        """Let this node leave if possible; `leaving` must be polled from then on.

        Args:
            node: number of the node; any number but this node's is refused.
            reason: why.
            rendezvous: the round.
            departure: a node's departure from the round.
            wait_s: longest wait for the other nodes, in seconds.
            taken: the request, which is answered once the workers have exited; None if no answer is expected.
        """
        plan = plan_node_drain(
            NodeSituation(
                node=node,
                nodes=rendezvous.nodes,
                least_nodes=self._least_nodes,
                spare_nodes=self._membership.spare_nodes(),
                leaving=departure.why(),
                hosts=self._membership.hosts,
                endpoints=self._endpoints,
                sole_shards=self._in_place.sole_shards,
                obstacle=self._in_place.obstacle_to_world_change,
            )
        )
        # The workers of another node are restarted to take rank 0, so they cannot keep training meanwhile.
        hands_over_first = rendezvous.node == 0
        if plan.action is not DrainAction.REFUSE:
            other = departure.announce(plan.reason, hands_over_first=hands_over_first)
            if other != plan.reason:
                why = f"node {node} is not drained: another node is being drained ({other})"
                plan = DrainPlan(DrainAction.REFUSE, why)
        # A check that fails repeatedly is refused for the same reason each time.
        if (said := f"{plan.reason} ({reason})") != self._refused or taken is not None:
            self._report(DrainPlanned(self._node, reason, plan.reason, str(plan.action)))
        self._refused = said
        if plan.action is not DrainAction.REFUSE:
            self._membership.leave()
            self._node_request = taken
            wait_s = 0.0 if hands_over_first else wait_s
            self.leaving = Leaving(self._node, reason, departure, wait_s, self._report, self._clock)
        return plan

    def close(self, departed: str = "") -> None:
        """Answer the requests that are open.

        Args:
            departed: how this node has left the run; empty if the run has ended.
        """
        for local_rank in list(self._drains):
            self._give_up(local_rank, "the run has ended on this node")
        if self._node_request is not None:
            self._node_request.answer(accepted=bool(departed), reason=departed or "the run has ended on this node")
            self._node_request = None
