"""Draining of this node's ranks: a replacement is made ready, then the rank is handed over at a committed step.

    request -> standby wanted -> standby ready: `HandOver` to the rank -> all ranks stop -> it exits -> replaced

Requests are taken once a step is committed. A fault on the way is recovered from as always. If it took the standby, or
another regrouping has begun, the rank is asked again once a standby is ready. If it took the rank itself, nothing is
left to drain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from lightning_ckptless.membership.agent.clock import Clock
from lightning_ckptless.membership.agent.in_place import InPlaceRecovery, WorkerControl
from lightning_ckptless.membership.events import DrainAsked, Drained, DrainGivenUp, Report
from lightning_ckptless.membership.requests import DrainRequest, Request, Requests, TakenRequest
from lightning_ckptless.protocol.draining import DrainAction, DrainPlan, DrainSituation, plan_drain
from lightning_ckptless.protocol.messages import HandOver

_LOOK_EVERY_S = 0.25
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
    """One rank that is being drained.

    Args:
        rank: the rank.
        pid: process that has it.
        reason: why it is drained.
        taken: the request, to be answered; None if nobody waits for an answer.
        asked_in: regrouping in which the process was asked to hand over; None if it was not.
    """

    rank: int
    pid: int
    reason: str
    taken: TakenRequest | None
    asked_in: int | None = None


class Draining:
    """Drains the ranks of one node.

    Args:
        node: its name.
        requests: to the run.
        in_place: the recoveries in place of this node.
        report: receives events.
        clock: of this node.
    """

    def __init__(self, node: str, requests: Requests, in_place: InPlaceRecovery, report: Report, clock: Clock) -> None:
        self._node = node
        self._requests = requests
        self._in_place = in_place
        self._report = report
        self._clock = clock
        self._looked_at = 0.0
        self._drains: dict[int, _Drain] = {}

    def poll(self, ranks: Mapping[int, int], world_size: int, workers: DrainableWorkers) -> None:
        """Take requests, and hand over ranks whose replacement is ready.

        Args:
            ranks: of this node, by local rank.
            world_size: number of ranks.
            workers: of this node.
        """
        if self._in_place.trains or world_size == 1:
            self._take_requests(ranks, world_size, workers)
        pids = workers.pids()
        for local_rank, drain in list(self._drains.items()):
            if pids[local_rank] != drain.pid:
                self._end(local_rank, "its process was lost before it handed over, and was replaced")
            elif why_not := self._in_place.why_no_standby:
                self._end(local_rank, f"no replacement could be made ready: {why_not}")
        self._in_place.wanted_for_drains = len(self._drains)
        ready = self._in_place.ready_standbys
        for local_rank, drain in list(self._drains.items())[:ready]:
            if drain.asked_in != self._in_place.number and workers.all_train:
                drain.asked_in = self._in_place.number
                workers.send_to(local_rank, HandOver(drain.reason))

    def _take_requests(self, ranks: Mapping[int, int], world_size: int, workers: DrainableWorkers) -> None:
        now = self._clock.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = now

        def concerns_us(request: Request) -> bool:
            if not isinstance(request, DrainRequest) or request.rank is None:
                return False
            # Exactly one agent refuses a rank that no node has.
            return request.rank in ranks.values() or (request.rank >= world_size and 0 in ranks.values())

        for taken in self._requests.take(concerns_us):
            assert isinstance(taken.request, DrainRequest) and taken.request.rank is not None
            plan = self.drain(taken.request.rank, ON_REQUEST, ranks, world_size, workers, taken)
            if plan.action is DrainAction.REFUSE:
                taken.answer(accepted=False, reason=plan.reason)

    def drain(
        self,
        rank: int,
        reason: str,
        ranks: Mapping[int, int],
        world_size: int,
        workers: DrainableWorkers,
        taken: TakenRequest | None = None,
    ) -> DrainPlan:
        """Drain a rank of this node, if that is possible.

        Args:
            rank: the rank.
            reason: why.
            ranks: of this node, by local rank.
            world_size: number of ranks.
            workers: of this node.
            taken: the request, which is answered once the rank is drained; None if nobody waits for an answer.
        """
        plan = plan_drain(
            DrainSituation(
                rank=rank,
                world_size=world_size,
                under_way=frozenset(drain.rank for drain in self._drains.values()),
                in_place=self._in_place.is_wanted,
                obstacle=self._in_place.obstacle,
                standbys=self._in_place.ready_standbys - len(self._drains),
            )
        )
        if plan.action is DrainAction.REPLACE:
            local_rank = next(local_rank for local_rank, its_rank in ranks.items() if its_rank == rank)
            self._drains[local_rank] = _Drain(rank, workers.pids()[local_rank], reason, taken)
        self._report(DrainAsked(self._node, rank, str(plan.action), reason, plan.reason))
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

    def _end(self, local_rank: int, why: str) -> None:
        drain = self._drains.pop(local_rank)
        reason = f"rank {drain.rank} was not handed over: {why}"
        self._report(DrainGivenUp(self._node, drain.rank, reason))
        if drain.taken is not None:
            drain.taken.answer(accepted=False, reason=reason)

    def close(self) -> None:
        """Answer the requests that the end of the run has overtaken."""
        for local_rank in list(self._drains):
            self._end(local_rank, "the run has ended on this node")
