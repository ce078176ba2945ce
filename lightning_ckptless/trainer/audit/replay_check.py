"""The replay check of one trainer: other ranks run its micro-batch again, and all decide together what follows.

At the beginning of a step that is due, before the rank trains on its batch:

    pack      the micro-batch of this rank, with all that its gradients depend on
    run       it, and that of the rank before; the two of a pair digest the same gradients if both are right
    compare   the digests of all ranks; where a pair differs, a third rank runs the micro-batch too
    decide    with a pure function (`protocol.replay_check`)

Nothing of this remains: the step then begins as if there had been no check.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

from lightning_ckptless.errors import DivergenceError, OptionsError
from lightning_ckptless.formats.pickles import Packed, UntrustedError, admit
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.protocol.divergence import Consequence
from lightning_ckptless.protocol.replay_check import (
    Comparison,
    PastMismatches,
    ReplayFinding,
    compare,
    judge_replay,
    runner_of,
)
from lightning_ckptless.protocol.rewind import RewindPlan
from lightning_ckptless.protocol.time_account import Bucket
from lightning_ckptless.replica.checksum import digest
from lightning_ckptless.replica.transport import receive_buffer, tensor_of
from lightning_ckptless.trainer.audit.micro_batch import ALGORITHM, MicroBatches
from lightning_ckptless.trainer.audit.replica_audit import exclude
from lightning_ckptless.trainer.commit.mirroring import Mirroring, Planned
from lightning_ckptless.trainer.rewind.rewinding import GoBackError, Rewinding, kept_versions
from lightning_ckptless.trainer.session.session import Session
from lightning_ckptless.trainer.state.trust import how_to_trust

_TAG = 0
_Digests = dict[str, str]
_Run = Callable[[Packed], _Digests]


class ReplayCheck:
    """Checks the gradients of all ranks every few optimizer steps.

    Args:
        session: session of this rank.
        every_n_steps: optimizer steps between two checks.
        micro_batches: packs and runs micro-batches.
        mirroring: the versions of this trainer.
        rewinding: its rewinds.
    """

    def __init__(
        self,
        session: Session,
        every_n_steps: int,
        micro_batches: MicroBatches,
        mirroring: Mirroring,
        rewinding: Rewinding,
    ) -> None:
        self._session = session
        self._every_n_steps = every_n_steps
        self._micro_batches = micro_batches
        self._mirroring = mirroring
        self._rewinding = rewinding
        self._loops = FitLoops(session.trainer)
        self._plan: Planned | None = None
        self._agreed_at: int | None = None
        self._past = PastMismatches()

    def run_if_due(self, batch: Any) -> None:
        """Check the gradients, if this is the first batch of a step to check; called before it is trained on.

        Args:
            batch: the batch, on the device.

        Raises:
            GoBackError: all ranks go back.
            DivergenceError: gradients differ, and the run must end.
            TransportError: a rank is replaced, or lost.
            OptionsError: the training step of the script cannot be checked.
        """
        if not self._is_due():
            return
        self._plan = self._mirroring.plan
        self._mirroring.settle()
        with self._session.report.time.spending(Bucket.MIRROR_STALL):
            self._check(batch)

    def _is_due(self) -> bool:
        """Whether all ranks check now: they know the same of this."""
        if self._session.members.world_size == 1 or not self._loops.begins_step:
            return False
        # The first step after a restoration, and the first that the versions of a new layout can go back to.
        is_first = self._mirroring.plan is not self._plan
        return is_first or self._session.trainer.global_step % self._every_n_steps == 0

    # ------------------------------------------------------------------ a check

    def _check(self, batch: Any) -> None:
        packed = self._micro_batches.pack(batch)
        with self._micro_batches.runs(packed) as run:
            finding, past = self._find(packed, run)
        found = judge_replay(finding, self._session.options.on_divergence, past)
        self._past = found.past
        if finding.comparisons or found.consequence is Consequence.REPLACE:
            wrong = sorted(found.wrong or finding.wrong)
            self._session.report.diverged(finding.facts | {"wrong": wrong}, found)
        if found.consequence is Consequence.END:
            raise DivergenceError(f"rank {self._session.rank}: {found.reason}")
        if found.consequence is Consequence.REPLACE:
            exclude(self._session, found.wrong, found.reason)
        if found.version is not None:
            self._agreed_at = found.version.optimizer_step
            step, past_rewinds = finding.step, self._rewinding.past
            reason = f"from step {step} back to {found.version}: {found.reason}"
            raise GoBackError(RewindPlan(found.version, step, 0, 0, past_rewinds, reason, is_answer=False))
        if not finding.comparisons:
            self._agreed_at = finding.step

    def _find(self, packed: Packed, run: _Run) -> tuple[ReplayFinding, PastMismatches]:
        members, step = self._session.members, int(self._session.trainer.global_step)
        everyone = range(members.world_size)
        rounds = [run(packed), self._run_again(packed, 1, everyone, run)]
        gathered = members.gather([*map(_whole, rounds), self._agreed_at, _plain(self._past)])
        past = max((_past_of(each) for *_, each in gathered), key=lambda each: each.count)
        agreed_at = max((at for _, _, at, _ in gathered if at is not None), default=None)
        differing = [
            owner for owner in everyone if gathered[owner][0] != gathered[runner_of(owner, 1, len(gathered))][1]
        ]
        if not differing:
            return ReplayFinding(step, agreed_at), past
        if len(everyone) > len(rounds):
            rounds.append(self._run_again(packed, 2, differing, run))
        comparisons = self._compare(rounds, differing)
        layout = self._mirroring.plan.layout if self._mirroring.plan is not None else None
        kept = [] if layout is None else kept_versions(members, layout, self._mirroring.newest)
        return ReplayFinding(step, agreed_at, comparisons, kept), past

    def _compare(self, rounds: list[_Digests], differing: Collection[int]) -> list[Comparison]:
        found = self._session.members.gather(list(rounds))
        return [
            compare(
                owner,
                {
                    runner: found[runner][distance]
                    for distance in range(len(rounds))
                    for runner in [runner_of(owner, distance, len(found))]
                },
            )
            for owner in differing
        ]

    def _run_again(self, packed: Packed, distance: int, owners: Collection[int], run: _Run) -> _Digests:
        """Hand this rank's micro-batch over, and run the one that this rank receives, if any."""
        members = self._session.members
        rank, world_size = members.rank, members.world_size
        owner = runner_of(rank, -distance, world_size)
        lengths = members.gather([len(packed)])
        received = receive_buffer(lengths[owner][0])
        members.transport.exchange(
            [(runner_of(rank, distance, world_size), _TAG, tensor_of(packed))] if rank in owners else [],
            [(owner, _TAG, received)] if owner in owners else [],
        )
        return run(self._admitted(received, owner)) if owner in owners else {}

    def _admitted(self, received: Any, owner: int) -> Packed:
        members, data = self._session.members, received.numpy().tobytes()
        if members.nodes[owner] == members.nodes[members.rank]:
            return Packed(data)
        try:
            return admit(data, members.trusted)
        except UntrustedError as error:
            raise OptionsError(
                f"rank {members.rank}: replay_check_every: the batch of rank {owner}, on another node: {error}"
                f"{how_to_trust(error)}"
            ) from error


def _whole(digests: _Digests) -> str:
    return digest(ALGORITHM, [str(sorted(digests.items())).encode()])


def _plain(past: PastMismatches) -> dict[str, Any]:
    return asdict(past) | {"wrong": sorted(past.wrong), "excluded": sorted(past.excluded)}


def _past_of(facts: dict[str, Any]) -> PastMismatches:
    return PastMismatches(facts["count"], facts["step"], frozenset(facts["wrong"]), frozenset(facts["excluded"]))
