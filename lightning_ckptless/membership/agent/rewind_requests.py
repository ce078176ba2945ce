"""Rewinds requested from another terminal: passed on to the workers of this node, whose decision is the answer.

A request to one rank is enough for all ranks to decide.

Apart from `agent.py`, because each part of the agent has its own file.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ckptless.membership.agent.workers import WorkerGroup
from lightning_ckptless.membership.channel.agent_channel import FromWorker
from lightning_ckptless.membership.requests import RewindRequest, TakenRequest
from lightning_ckptless.protocol.messages import Rewind, RewindDecided


class RewindRequests:
    """The requests that one agent has taken but not yet answered."""

    def __init__(self) -> None:
        self._taken: dict[int, TakenRequest] = {}
        self._count = 0

    def receive(self, received: Sequence[FromWorker]) -> None:
        """Answer requests that the workers have decided on."""
        for _, message, _ in received:
            if isinstance(message, RewindDecided) and (taken := self._taken.pop(message.number, None)) is not None:
                taken.answer(accepted=message.accepted, reason=message.reason)

    def pass_on(self, taken: TakenRequest, asked: RewindRequest, workers: WorkerGroup) -> None:
        """Pass a request on to the workers, all of which train.

        Args:
            taken: the request, which is answered once they have decided.
            asked: what it asks for.
            workers: this node's workers.
        """
        self._count += 1
        self._taken[self._count] = taken
        # The first of them is enough; if it is lost before the decision, the terminal is not answered.
        rank = workers.running_ranks[0]
        workers.send_to(rank, Rewind(self._count, asked.to_step, asked.steps, asked.skip_batches))
