"""Requests to the run from other terminals: taken here and passed to the part that carries them out.

A rewind is taken only while all workers of this node train, a drain once a step is committed; one that arrives during a
recovery waits for its end.

Apart from `agent.py`, because each part of the agent has its own file.
"""

from __future__ import annotations

from lightning_ckptless.membership.agent.departure import Departure
from lightning_ckptless.membership.agent.draining import Draining
from lightning_ckptless.membership.agent.rewind_requests import RewindRequests
from lightning_ckptless.membership.agent.workers import WorkerGroup
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.rendezvous.rounds import Round
from lightning_ckptless.membership.requests import DrainRequest, Request, Requests, RewindRequest

_LOOK_EVERY_S = 0.2


class RunRequests:
    """Takes the requests to the run that this agent can carry out.

    Args:
        requests: to the run.
        draining: carries out drains.
        rewinds: passes rewinds on to the workers.
        clock: this node's clock.
    """

    def __init__(self, requests: Requests, draining: Draining, rewinds: RewindRequests, clock: Clock) -> None:
        self._requests = requests
        self._draining = draining
        self._rewinds = rewinds
        self._clock = clock
        self._looked_at = 0.0

    def poll(self, rendezvous: Round, departure: Departure, workers: WorkerGroup) -> None:
        """Take requests if a check is due, and have them carried out.

        Args:
            rendezvous: the round.
            departure: a node's departure from the round.
            workers: this node's workers.
        """
        now = self._clock.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = now

        def concerns_us(request: Request) -> bool:
            if isinstance(request, DrainRequest):
                return self._draining.concerns(request, rendezvous)
            return workers.all_train

        for taken in self._requests.take(concerns_us):
            match taken.request:
                case DrainRequest():
                    self._draining.heed(taken, taken.request, rendezvous, departure, workers)
                case RewindRequest():
                    self._rewinds.pass_on(taken, taken.request, workers)
