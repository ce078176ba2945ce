"""The replay check: ranks that compute other gradients from the same micro-batch, which of them is wrong, what follows.

Before the reduction, each rank has gradients of its own, which no other rank can compare with anything. So every few
steps another rank runs the same micro-batch, from the same weights and random numbers:

    rank r + 1   runs the micro-batch of rank r again
    rank r + 2   does too if ranks r and r + 1 differ, so that a majority decides

| Finding | What follows |
|---|---|
| the gradients agree | nothing |
| they differ: `warn` | nothing |
| `raise`, or the fourth time in a row | the run ends |
| they have not agreed yet | the run ends: the ranks may be legitimately different |
| no step was made since they agreed: `heal`, and a rank is wrong by majority | this rank is replaced |
| the same, but no rank is known to be wrong, or `rewind` | the run ends: the replay would differ again |
| otherwise, with `heal` and `rewind` | all ranks go back to the newest version not after the last check that agreed |
| they went back because the same rank was wrong again, with `heal` | this rank is replaced, even if it is right now |

The first step after a restoration is checked. So a rank that is wrong persistently is found again as soon as all ranks
have gone back, when nothing wrong is left in the state, and its replacement continues from there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ckptless.protocol.divergence import MOST_IN_A_ROW, MOST_NAMED, Consequence, outvoted, verdict_on
from lightning_ckptless.protocol.versions import Version


def runner_of(owner: int, distance: int, world_size: int) -> int:
    """The rank that runs the micro-batch of another rank, in the round of this distance."""
    return (owner + distance) % world_size


@dataclass(frozen=True, slots=True)
class Comparison:
    """The gradients that ranks have computed from one micro-batch.

    Args:
        owner: rank whose micro-batch it is.
        digests: digest of all gradients, by rank.
        tensors: names of the tensors whose gradients differ.
    """

    owner: int
    digests: Mapping[int, str]
    tensors: tuple[str, ...]

    @property
    def wrong(self) -> frozenset[int]:
        """The ranks that differ from the majority; empty without one."""
        return outvoted(self.digests)


def compare(owner: int, found: Mapping[int, Mapping[str, str]]) -> Comparison:
    """Compare what ranks have computed from one micro-batch.

    Args:
        owner: rank whose micro-batch it is.
        found: digest of each gradient by the name of its tensor, by rank.
    """
    names = dict.fromkeys(name for digests in found.values() for name in digests)
    differing = (name for name in names if len({digests.get(name) for digests in found.values()}) > 1)
    return Comparison(owner, {rank: str(sorted(digests.items())) for rank, digests in found.items()}, tuple(differing))


@dataclass(frozen=True, slots=True)
class ReplayFinding:
    """What all ranks have gathered in a replay check.

    Args:
        step: optimizer steps made before it.
        agreed_at: the same for the last check that agreed; None if there was none.
        comparisons: the micro-batches on which ranks differ.
        kept: versions that all ranks can go back to.
    """

    step: int
    agreed_at: int | None
    comparisons: Sequence[Comparison] = ()
    kept: Collection[Version] = ()

    @property
    def wrong(self) -> frozenset[int]:
        """The ranks that a majority shows to be wrong; empty if it does not for some micro-batch."""
        found = [each.wrong for each in self.comparisons]
        return frozenset[int]().union(*found) if all(found) else frozenset()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks whose gradients were compared."""
        return tuple(sorted({rank for each in self.comparisons for rank in each.digests}))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors whose gradients differ."""
        return tuple(dict.fromkeys(name for each in self.comparisons for name in each.tensors))

    @property
    def is_clean(self) -> bool:
        """Whether no step was made since the ranks agreed."""
        return self.agreed_at is not None and self.agreed_at >= self.step

    @property
    def target(self) -> Version | None:
        """The version to go back to; None if none is old enough."""
        agreed_at = -1 if self.agreed_at is None else self.agreed_at
        return max((each for each in self.kept if each.optimizer_step <= agreed_at), default=None)

    @property
    def facts(self) -> dict[str, Any]:
        """The finding as fields of an event."""
        back_at = self.target if self.target is not None and not self.is_clean else None
        return {
            "step": self.step,
            "committed": self.step if back_at is None else back_at.optimizer_step,
            "tensors": list(self.tensors[:MOST_NAMED]),
            "ranks": list(self.ranks),
            "wrong": sorted(self.wrong),
            "found_by": "replay_check",
        }

    def __str__(self) -> str:
        more = len(self.tensors) - MOST_NAMED
        tensors = ", ".join(self.tensors[:MOST_NAMED]) + (f" and {more} more tensors" if more > 0 else "")
        ranks = ", ".join(map(str, self.ranks))
        what = f"ranks {ranks} compute different gradients from the same micro-batch in step {self.step + 1}"
        return f"{what}, of {tensors}; {verdict_on(self.wrong)}"


@dataclass(frozen=True, slots=True)
class PastMismatches:
    """The mismatches since the run got beyond the first of them.

    Args:
        count: number of them.
        step: latest step of them.
        wrong: the ranks that were wrong in any of them.
        excluded: the ranks to replace as soon as all ranks are back at a version from before.
    """

    count: int = 0
    step: int = -1
    wrong: frozenset[int] = frozenset()
    excluded: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class ReplayJudgement:
    """What follows from a replay check, and why.

    Args:
        consequence: what follows.
        reason: explanation, one sentence.
        past: the mismatches so far, this one included.
        wrong: the ranks to replace, if any are to be.
        version: version that all ranks go back to; None if they do not.
    """

    consequence: Consequence
    reason: str
    past: PastMismatches
    wrong: frozenset[int] = frozenset()
    version: Version | None = None


def judge_replay(finding: ReplayFinding, policy: str, past: PastMismatches) -> ReplayJudgement:
    """Decide what follows from a replay check.

    Args:
        finding: what all ranks have gathered.
        policy: `heal`, `rewind`, `raise` or `warn`.
        past: the mismatches before it.
    """
    named = past.excluded | finding.wrong
    if finding.is_clean and past.excluded:
        reason = f"{verdict_on(named)} again after a replay{_IT}"
        return ReplayJudgement(Consequence.REPLACE, reason, PastMismatches(), named)
    if not finding.comparisons:
        return ReplayJudgement(Consequence.NOTHING, "", past if finding.step < past.step else PastMismatches())
    count, consequence = past.count + 1, _consequence(finding, policy, past)
    reason = f"{finding}{_explanation(finding, consequence, policy, count)}"
    if consequence is Consequence.REPLACE:
        return ReplayJudgement(consequence, reason, PastMismatches(), named)
    again = past.wrong & finding.wrong if policy == "heal" else frozenset[int]()
    now = PastMismatches(count, max(finding.step, past.step), past.wrong | finding.wrong, again)
    version = finding.target if consequence is Consequence.GO_BACK else None
    return ReplayJudgement(consequence, reason, now, version=version)


_IT = ": it is replaced"


def _consequence(finding: ReplayFinding, policy: str, past: PastMismatches) -> Consequence:
    if policy == "raise":
        return Consequence.END
    if policy == "warn":
        return Consequence.NOTHING
    if finding.is_clean:
        return Consequence.REPLACE if policy == "heal" and finding.wrong else Consequence.END
    is_possible = past.count < MOST_IN_A_ROW and finding.target is not None
    return Consequence.GO_BACK if is_possible else Consequence.END


def _explanation(finding: ReplayFinding, consequence: Consequence, policy: str, count: int) -> str:
    if consequence is Consequence.GO_BACK:
        return ""
    if consequence is Consequence.REPLACE:
        return _IT
    if consequence is Consequence.NOTHING:
        return ". on_divergence='warn', so training continues"
    why = f"{count} times in a row, also after replays"
    if policy == "raise":
        why = "on_divergence='raise'"
    elif finding.agreed_at is None:
        why = "in the first check"
    elif finding.is_clean:
        why = "with no step since they agreed, so that going back does not help"
    elif finding.target is None:
        why = f"no version from before step {finding.agreed_at} is left in memory to go back to"
    return (
        f" ({why}). Check the hardware of these ranks; if the training step does not compute the same when it runs "
        "twice, or ranks run on different hardware or libraries, leave out replay_check_every"
    )
