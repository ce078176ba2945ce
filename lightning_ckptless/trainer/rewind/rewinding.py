"""Requests for rewinds on one rank, and the decision of all ranks.

    any rank    requests a rewind, in any hook, and votes for it in the next round
    all ranks   stop at the same point between two steps (`CoordinatedStop`), gather the requests, and decide with a
                pure function (`protocol.rewind`): go back, continue training, or end the run with an error

The script's requests are part of the versions: a fault before the decision does not lose them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from lightning_ckptless.errors import OptionsError, RewindError
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.protocol.divergence import Difference
from lightning_ckptless.protocol.rewind import (
    PastRewinds,
    RewindAsked,
    RewindPlan,
    RewindState,
    plan_rewind,
)
from lightning_ckptless.protocol.versions import Version, complete_versions
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.mirror.coordinated_stop import CoordinatedStop
from lightning_ckptless.replica.mirror.mirror import Mirror
from lightning_ckptless.replica.restore import gather_inventory
from lightning_ckptless.trainer.audit.replica_audit import Audit
from lightning_ckptless.trainer.data.skipping import obstacle_to_skipping
from lightning_ckptless.trainer.session.member_set import MemberSet
from lightning_ckptless.trainer.session.session import Session


class GoBackError(Exception):
    """Ends the current attempt to run the fit loop: all ranks have decided to go back.

    Args:
        plan: the decision.
    """

    def __init__(self, plan: RewindPlan) -> None:
        super().__init__(plan.reason)
        self.plan = plan


Decided = Callable[[int, bool, str], None]
"""Called with the number of a request from another terminal, whether it is carried out, and the reason."""


class Rewinding:
    """The rewinds of one trainer.

    Args:
        session: session of this rank.
        loops: loops of the trainer.
        decided: called when a request from another terminal is decided.
        audit: decides what follows if replicas differ.
    """

    def __init__(self, session: Session, loops: FitLoops, decided: Decided, audit: Audit) -> None:
        self._session = session
        self._loops = loops
        self._decided = decided
        self._audit = audit
        self._asked: list[RewindAsked] = []
        self.past = PastRewinds()
        self._captured = RewindState(), RewindState().to_dict()

    # ------------------------------------------------------------------ asking

    def ask(
        self, *, to_step: int | None, steps: int | None, skip_batches: int | None, cause: str, request: int = 0
    ) -> None:
        """Request a rewind; it is decided within the next steps.

        Args:
            to_step: optimizer step to return to; None if `steps` is given.
            steps: number of optimizer steps to go back; None if `to_step` is given.
            skip_batches: batches to skip from there on; None for all up to the current one.
            cause: who requests it, and why.
            request: number of the request from another terminal; 0 for the script.

        Raises:
            OptionsError: the rewind is not possible at all.
        """
        done = int(self._session.trainer.global_step)
        if (to_step is None) == (steps is None):
            raise OptionsError(f"rewind(to_step={to_step}, steps={steps}): set one of the two")
        step = done - (steps or 0) if to_step is None else to_step
        if step < 0 or (steps or 0) < 0:
            raise OptionsError(f"rewind(to_step={to_step}, steps={steps}) at step {done}: there is no step {step}")
        if skip_batches is not None and skip_batches < 0:
            raise OptionsError(f"rewind(skip_batches={skip_batches}): expected 0 or more")
        self.require_possible(skips=skip_batches != 0)
        skip_to_batch = self._loops.batches_begun if skip_batches is None else 0
        self._asked.append(RewindAsked(step, done, skip_batches or 0, skip_to_batch, cause, request))

    def require_possible(self, *, skips: bool) -> None:
        """Reject a rewind that this run does not support.

        Args:
            skips: whether batches are skipped.

        Raises:
            OptionsError: there is no history, or batches of this dataloader cannot be skipped.
        """
        if not self._session.options.history:
            raise OptionsError("a rewind needs earlier versions in memory, but history=0: set history=1 or more")
        if skips and (obstacle := obstacle_to_skipping(self._loops)):
            raise OptionsError(f"batches cannot be skipped after a rewind: {obstacle}; set skip_batches=0")

    # ------------------------------------------------------------------ deciding

    @property
    def is_asked(self) -> bool:
        """Whether this rank requests a rewind; read in the mirror thread."""
        return bool(self._asked)

    def stop_if_due(
        self, mirror: Mirror | None, tensors: Callable[[], Mapping[str, Tensor]], *, at_end: bool = False
    ) -> None:
        """Called by all ranks between two steps: decide if all ranks have agreed to stop here.

        Args:
            mirror: mirror of the generation; None before its first version.
            tensors: returns this rank's live tensors, by name.
            at_end: whether no step follows, so that this is the last chance.

        Raises:
            GoBackError: all ranks go back.
            RewindError: they cannot, and the run must end.
            DivergenceError: replicas differ, and the run must end.
            TransportError: a rank is replaced, because its replicas differ again.
        """
        if mirror is None:
            return
        if at_end:
            mirror.settle()
        if mirror.rewind.is_agreed if at_end else mirror.rewind.passes():
            mirror.settle()
            if mirror.difference is not None:
                self._heal(mirror, mirror.difference, tensors())
            self._decide(mirror)
            mirror.rewind = CoordinatedStop()

    def _heal(self, mirror: Mirror, difference: Difference, tensors: Mapping[str, Tensor]) -> None:
        found = self._audit.settle(mirror, difference, tensors)
        if found.version is not None:
            step = int(self._session.trainer.global_step)
            reason = f"from step {step} back to {found.version}: {found.reason}"
            # The mirror stays in doubt until it is abandoned: versions of the device tier are not to be restored.
            raise GoBackError(RewindPlan(found.version, step, 0, 0, self.past, reason, is_answer=False))
        mirror.difference, mirror.in_doubt = None, False

    def _decide(self, mirror: Mirror) -> None:
        members, layout = self._session.members, mirror.layout
        mine, self._asked = self._asked, []
        asked = [RewindAsked(**each) for of_rank in members.gather([asdict(each) for each in mine]) for each in of_rank]
        if not asked:
            return
        kept = kept_versions(members, layout, mirror.committed)
        found = plan_rewind(asked, kept, int(self._session.trainer.global_step), self.past)
        for each in asked:
            if each.request:
                self._decided(each.request, isinstance(found, RewindPlan), found.reason)
        if isinstance(found, RewindPlan):
            raise GoBackError(found)
        self._session.report.rewind_refused(found.reason)
        if found.ends_run:
            raise RewindError(f"rank {members.rank}: {found.reason}")

    # ------------------------------------------------------------------ state

    def capture(self) -> dict[str, Any]:
        """Return the state of rewinds for a version; the same object as long as nothing changes."""
        known, found = self._captured
        if self._asked or self.past is not known.past or known.asked or self._audit.sends != known.sends_replicas:
            asked = tuple(each for each in self._asked if not each.request)
            state = RewindState(asked, self.past, self._audit.sends)
            found = found if state == known else state.to_dict()
            self._captured = state, found
        return found

    def restore(self, saved: dict[str, Any]) -> None:
        """Restore what `capture` returned; requests from another terminal stay."""
        state = RewindState.from_dict(saved)
        self._asked = [*state.asked, *(each for each in self._asked if each.request)]
        self.past, self._audit.sends = state.past, state.sends_replicas and self._audit.may_send


def kept_versions(members: MemberSet, layout: Layout, newest: Version | None) -> list[Version]:
    """The versions that all ranks can go back to. All ranks call it together.

    Args:
        members: the ranks.
        layout: the current layout.
        newest: the newest version that is committed; None if there is none.
    """
    inventory = gather_inventory(members.arena, members.transport, reads=members.rank == members.ranks_of_node[0])
    kept = complete_versions(inventory, world_size=members.world_size, layout=layout.digest)
    return [version for version in kept if newest is not None and version <= newest]


def carried_out(saved: dict[str, Any], plan: RewindPlan) -> dict[str, Any]:
    """The state of rewinds in the version that the ranks go back to."""
    state = RewindState.from_dict(saved)
    return replace(state, asked=() if plan.is_answer else state.asked, past=plan.past).to_dict()
