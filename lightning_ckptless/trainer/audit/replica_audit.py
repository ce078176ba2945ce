"""The audit of replicas: what all ranks do when replicas that should be equal differ.

The mirror finds a difference in the round of its version, and which pieces differ. All ranks stop at the same point
between two steps, compare these pieces of their tensors as well, and decide with a pure function
(`protocol.divergence`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, NoReturn

from torch import Tensor

from lightning_ckptless.errors import DivergenceError, TransportError
from lightning_ckptless.protocol.divergence import (
    Consequence,
    Difference,
    Finding,
    Judgement,
    PastDifferences,
    judge,
)
from lightning_ckptless.protocol.mirror_interval import INTERVALS
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.mirror.differences import compare_live
from lightning_ckptless.replica.mirror.mirror import Mirror
from lightning_ckptless.trainer.recovery.own_process import leave_process
from lightning_ckptless.trainer.session.session import Session

log = logging.getLogger(__name__)


class Audit:
    """The audit of one trainer's replicas.

    Args:
        session: session of this rank.
        since: version that the run starts from; None if it starts from its beginning or joins a run in progress.

    Attributes:
        sends: whether replicas are sent and no longer compared.
        stages_blocking: whether the state is copied before the next batch starts: something writes to tensors while
            they are copied, in a way that torch does not count.
    """

    def __init__(self, session: Session, since: Version | None) -> None:
        self.sends = False
        self.stages_blocking = False
        self._session = session
        self._first_step = 0 if since is None else since.optimizer_step
        self._past = PastDifferences()

    @property
    def may_send(self) -> bool:
        """Whether training can continue with replicas that differ: not if each rank keeps its own in device memory."""
        return self._session.device_tier is None

    def settle(self, mirror: Mirror, difference: Difference, tensors: Mapping[str, Tensor]) -> Judgement:
        """Decide what follows from a difference. All ranks call it together, between two steps.

        Args:
            mirror: the mirror, after its last round.
            difference: what it has found.
            tensors: this rank's live tensors, by name.

        Returns:
            The decision: all ranks go back, or continue training.

        Raises:
            DivergenceError: the run must end.
            TransportError: a rank is replaced.
        """
        finding, before = self._gather(mirror, difference, tensors)
        found = judge(finding, self._session.options.on_divergence, before, may_send=self.may_send)
        if finding.has_vanished and not finding.torn and found.past.count > 1:
            self.stages_blocking = True
        self._past = found.past
        self._session.report.diverged(finding.facts, found)
        if found.consequence is Consequence.END:
            raise DivergenceError(f"rank {self._session.rank}: {found.reason}")
        if found.consequence is Consequence.REPLACE:
            exclude(self._session, finding.wrong, found.reason)
        self.sends = self.sends or found.consequence is Consequence.SEND
        return found

    def _gather(
        self, mirror: Mirror, difference: Difference, tensors: Mapping[str, Tensor]
    ) -> tuple[Finding, list[PastDifferences]]:
        members, committed = self._session.members, mirror.committed
        live = compare_live(difference, mirror.layout, tensors, members.transport)
        every = self._session.options.mirror_every_n_steps
        reach = 0 if difference.pieces else mirror.turns * (every if isinstance(every, int) else INTERVALS[-1])
        has_agreed = committed is not None and committed.optimizer_step > self._first_step + reach
        past = asdict(self._past) | {"wrong": sorted(self._past.wrong)}
        gathered = members.gather([mirror.torn == difference.version, has_agreed, past])
        finding = Finding(
            difference,
            live,
            torn=any(torn for torn, _, _ in gathered),
            committed=committed,
            has_agreed=all(agreed for _, agreed, _ in gathered),
            reach=reach,
        )
        return finding, [_past_of(each) for _, _, each in gathered]


def exclude(session: Session, wrong: Collection[int], reason: str) -> NoReturn:
    """End this process if its rank is wrong, so that the agent replaces it; the others wait for the new one.

    Args:
        session: session of this rank.
        wrong: the ranks that are wrong.
        reason: explanation, one sentence.

    Raises:
        TransportError: this rank is not one of them.
    """
    if session.rank in wrong:
        log.error("ckptless: rank %d: %s", session.rank, reason)
        leave_process()
    raise TransportError(f"rank {session.rank}: {reason}")


def _past_of(facts: Mapping[str, Any]) -> PastDifferences:
    committed = facts["committed"]
    return PastDifferences(facts["count"], committed and Version(**committed), frozenset(facts["wrong"]))
