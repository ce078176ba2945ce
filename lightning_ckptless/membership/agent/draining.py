"""Draining on this node: ranks are handed over at a committed step, or the whole node leaves.

    request -> standby wanted -> standby ready: `HandOver` to the rank -> all ranks stop -> it exits -> replaced

A rank is drained on request, or as a straggler; a node on request, on a notice, or when it fails its health check. A
fault on the way is recovered from as always. If it took the standby, or
another regrouping has begun, the rank is asked again once a standby is ready. If it took the rank itself, nothing is
left to drain. How a node leaves is described in `departure.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lightning_ckptless.membership.agent.clock import Clock
from lightning_ckptless.membership.agent.departure import Departure, Leaving
from lightning_ckptless.membership.agent.in_place import InPlaceRecovery, WorkerControl
from lightning_ckptless.membership.agent.straggler_watch import StragglerWatch
from lightning_ckptless.membership.drain_events import Drained, DrainGivenUp, DrainPlanned
from lightning_ckptless.membership.events import Report
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
"""Longest wait of a leaving node for the others: a node that takes its place may run its script for long."""
ON_REQUEST = "requested with `ckptless drain`"


class DrainableWorkers(WorkerControl, Protocol):
    """What draining needs of this node's workers; see `WorkerGroup`."""

    @property
    def all_train(self) -> bool:
        """Whether all workers run, are in the training loop and have not been allowed to leave it."""

    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""


class Seat(Protocol):
    """This node's place in the rendezvous; see `handlers.py`."""

    hosts: bool

    def leave(self) -> None:
        """Leave the round, so that the other nodes can complete the next one without this node."""

    def spare_nodes(self) -> int:
        """How many nodes wait for a place."""


@dataclass(slots=True)
class _Drain:
    """One rank that is being drained.

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
        seat: this node's place in the rendezvous.
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
        seat: Seat,
        stragglers: StragglerWatch,
        in_place: InPlaceRecovery,
        report: Report,
        clock: Clock,
    ) -> None:
        self.leaving: Leaving | None = None
        self._node = node
        self._least_nodes = least_nodes
        self._endpoints = endpoints
        self._seat = seat
        self._stragglers = stragglers
        self._in_place = in_place
        self._report = report
        self._clock = clock
        self._unfit = ""
        self._refused = ""
        self._drains: dict[int, _Drain] = {}
        self._node_request: TakenRequest | None = None

    def poll(self, rendezvous: Round, departure: Departure, workers: DrainableWorkers) -> None:
        """Drain what is unfit or slow, and hand over ranks whose replacement is ready.

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
                self._give_up(local_rank, f"no replacement could be made ready: {why_not}")
        self._in_place.wanted_for_drains = len(self._drains)
        for local_rank, drain in list(self._drains.items())[: self._in_place.ready_standbys]:
            if drain.asked_in != self._in_place.number and workers.all_train:
                drain.asked_in = self._in_place.number
                workers.send_to(local_rank, HandOver(drain.reason))

    # ------------------------------------------------------------------ why

    def concerns(self, request: DrainRequest, rendezvous: Round) -> bool:
        """Whether this agent answers a request now. Exactly one refuses a rank or a node that does not exist."""
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
            asked: what it asks for.
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
        """Drain a rank of this node, if that is possible.

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
            done: how.
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
        """Let this node leave, if that is possible: from then on, `leaving` has to be polled.

        Args:
            node: number of the node; another one than this one does not exist.
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
                spare_nodes=self._seat.spare_nodes(),
                leaving=departure.why(),
                hosts=self._seat.hosts,
                endpoints=self._endpoints,
                sole_shards=self._in_place.sole_shards,
                obstacle=self._in_place.obstacle_to_world_change,
            )
        )
        if plan.action is not DrainAction.REFUSE and (other := departure.announce(plan.reason)) != plan.reason:
            plan = DrainPlan(DrainAction.REFUSE, f"node {node} is not drained: another node is being drained ({other})")
        # A check that fails again and again is refused for the same reason each time.
        if (said := f"{plan.reason} ({reason})") != self._refused or taken is not None:
            self._report(DrainPlanned(self._node, reason, plan.reason, str(plan.action)))
        self._refused = said
        if plan.action is not DrainAction.REFUSE:
            self._seat.leave()
            self._node_request = taken
            # The workers of another node are started again as rank 0, so they cannot train on meanwhile.
            wait_s = wait_s if rendezvous.node else 0.0
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
