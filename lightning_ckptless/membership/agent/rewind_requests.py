"""Rewinds that another terminal asks for: passed on to the workers of this node, whose decision is the answer.

One rank that asks is enough for all ranks to decide. A request is taken only while all workers of this node train; one
that comes during a recovery waits for its end.

Apart from `agent.py`, because each part of the agent has its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_ckptless.membership.agent.clock import Clock
from lightning_ckptless.membership.agent.workers import WorkerGroup
from lightning_ckptless.membership.channel.agent_channel import FromWorker
from lightning_ckptless.membership.requests import Request, RewindRequest, TakenRequest
from lightning_ckptless.protocol.messages import Rewind, RewindDecided

_LOOK_EVERY_S = 0.2

Take = Callable[[Callable[[Request], bool]], list[TakenRequest]]
"""Takes the requests to this run for which a function returns true; see `Requests.take`."""


class RewindRequests:
    """The requests of one agent that were taken and not answered yet.

    Args:
        take: takes requests.
        clock: of this node.
    """

    def __init__(self, take: Take, clock: Clock) -> None:
        self._take = take
        self._clock = clock
        self._looked_at = 0.0
        self._taken: dict[int, TakenRequest] = {}
        self._count = 0

    def maintain(self, received: Sequence[FromWorker], workers: WorkerGroup) -> None:
        """Answer what the workers have decided, and pass on what was asked for since.

        Args:
            received: messages of the workers.
            workers: of this node.
        """
        for _, message, _ in received:
            if isinstance(message, RewindDecided) and (taken := self._taken.pop(message.number, None)) is not None:
                taken.answer(accepted=message.accepted, reason=message.reason)
        now = self._clock.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S or not workers.all_train:
            return
        self._looked_at = now
        for taken in self._take(lambda request: isinstance(request, RewindRequest)):
            assert isinstance(taken.request, RewindRequest)
            self._count += 1
            self._taken[self._count] = taken
            asked = taken.request
            # The first of them is enough; if it is lost before the decision, the terminal is not answered.
            rank = workers.running_ranks[0]
            workers.send_to(rank, Rewind(self._count, asked.to_step, asked.steps, asked.skip_batches))
