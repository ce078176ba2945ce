"""Rewinding: to which version all ranks go back, decided from what they have asked for and what their arenas contain.

Ranks may ask for different steps, or only one of them may ask: a spike is often seen by one rank only. All ranks gather
what was asked for at one step and decide with the same function, so that the run is never split.

A rewind that does not help is repeated by whatever has asked for it. Therefore a rewind that is asked for before the
run has got further than at the one before goes back twice as far, and the fourth in a row ends the run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

from lightning_ckptless.protocol.versions import Version

MOST_IN_A_ROW = 3
"""Rewinds without progress beyond the step at which the first of them was asked for."""


@dataclass(frozen=True, slots=True)
class RewindAsked:
    """A rewind that a rank asks for.

    Args:
        step: optimizer step to return to.
        at_step: optimizer step at which it was asked for.
        skip_batches: batches of each rank to skip from there on.
        skip_to_batch: batches of a rank, counted from the start of the run, that are to be skipped if they come after
            the version; 0 for none.
        cause: who asks, and why.
        request: number of the request from another terminal; 0 if the script asks.
    """

    step: int
    at_step: int
    skip_batches: int = 0
    skip_to_batch: int = 0
    cause: str = "the script asked for it"
    request: int = 0


@dataclass(frozen=True, slots=True)
class PastRewinds:
    """The rewinds since the run last made progress.

    Args:
        count: number of them.
        at_step: optimizer step at which the latest was asked for: progress begins after it.
        to_step: optimizer step to which the latest went back.
    """

    count: int = 0
    at_step: int = -1
    to_step: int = -1


@dataclass(frozen=True, slots=True)
class RewindPlan:
    """A rewind that all ranks carry out.

    Args:
        version: version to go back to.
        from_step: optimizer step at which all ranks stop.
        skip_batches: see `RewindAsked`.
        skip_to_batch: see `RewindAsked`.
        past: the rewinds since the run last made progress, this one included.
        reason: explanation, one sentence.
        is_answer: whether it answers what ranks have asked for; otherwise that is still to be decided.
    """

    version: Version
    from_step: int
    skip_batches: int
    skip_to_batch: int
    past: PastRewinds
    reason: str
    is_answer: bool = True

    def batches_to_skip(self, done: int, left: int) -> int:
        """The batches of each rank to skip; one of those left in the epoch is always trained on.

        Args:
            done: batches that the version includes, counted from the start of the run.
            left: batches that are left in the epoch.
        """
        return max(0, min(max(self.skip_batches, self.skip_to_batch - done), left - 1))


@dataclass(frozen=True, slots=True)
class NoRewind:
    """A rewind that is not carried out.

    Args:
        reason: why not, one sentence.
        ends_run: whether the run must end because of that.
    """

    reason: str
    ends_run: bool


def plan_rewind(
    asked: Sequence[RewindAsked], kept: Collection[Version], from_step: int, past: PastRewinds
) -> RewindPlan | NoRewind:
    """Decide what follows from what the ranks have asked for. The deepest target counts, with what it skips.

    What is asked for later, on the way to the decision, often has the same cause: a loss stays NaN.

    Args:
        asked: what all ranks have asked for, at least once.
        kept: the complete versions in the arenas of all ranks.
        from_step: the last optimizer step that all ranks have made.
        past: the rewinds since the run last made progress.
    """
    deepest = min(asked, key=lambda each: each.step)
    at_step = max(each.at_step for each in asked)
    count = past.count if at_step <= past.at_step else 0
    ends_run = not all(each.request for each in asked)
    if count >= MOST_IN_A_ROW:
        return NoRewind(_too_many(count, at_step, deepest), ends_run=True)
    if deepest.step > from_step:
        reason = f"step {deepest.step} cannot be returned to: the newest step is {from_step}"
        return NoRewind(reason, ends_run)
    wanted = deepest.step if not count else min(deepest.step, past.to_step - max(1, at_step - past.to_step))
    reachable = [version for version in kept if version.optimizer_step <= wanted]
    if not reachable and count:
        # Twice as far is further than the history reaches: as far as possible, if that is further than before.
        most = min(deepest.step, past.to_step - 1)
        reachable = sorted(version for version in kept if version.optimizer_step <= most)[:1]
    if not reachable:
        is_known = any(version.optimizer_step <= deepest.step for version in kept)
        reason = _too_many(count, at_step, deepest) if is_known else _beyond(deepest, kept)
        return NoRewind(reason, ends_run or bool(count))
    version, first = max(reachable), [each for each in asked if each.step == deepest.step]
    return RewindPlan(
        version=version,
        from_step=from_step,
        skip_batches=max(each.skip_batches for each in first),
        skip_to_batch=max(each.skip_to_batch for each in first),
        past=PastRewinds(count + 1, at_step, version.optimizer_step),
        reason=_why(deepest, version, from_step, count, len(asked)),
    )


def _why(deepest: RewindAsked, version: Version, from_step: int, count: int, ranks: int) -> str:
    others = f", the deepest of {ranks} that were asked for" if ranks > 1 else ""
    nearest = "" if version.optimizer_step == deepest.step else f" instead of step {deepest.step}"
    again = (
        f"; rewind {count + 1} of at most {MOST_IN_A_ROW} without progress, so it goes further back" if count else ""
    )
    return f"from step {from_step} back to {version}{nearest}: {deepest.cause}{others}{again}"


def _beyond(deepest: RewindAsked, kept: Collection[Version]) -> str:
    return (
        f"step {deepest.step} cannot be returned to: the history has {steps_of(kept)}. Ask for one of these, or set "
        "history= (versions kept) or history_every= (steps between them) to a larger value"
    )


def _too_many(count: int, at_step: int, deepest: RewindAsked) -> str:
    times = "once" if count == 1 else f"{count} times in a row"
    return (
        f"the run was rewound {times} without getting beyond step {at_step}, and now again: {deepest.cause}. Rewinding "
        "does not help: lower the learning rate, clip the gradients, skip more batches or remove the data at this "
        "step, and restart"
    )


def steps_of(versions: Collection[Version]) -> str:
    """Name the steps of versions, as ranges."""
    steps = sorted({version.optimizer_step for version in versions})
    if not steps:
        return "no step yet"
    gaps = [(older, newer) for older, newer in pairwise(steps) if newer > older + 1]
    starts, ends = [steps[0], *(newer for _, newer in gaps)], [*(older for older, _ in gaps), steps[-1]]
    ranges = (str(start) if start == end else f"{start} to {end}" for start, end in zip(starts, ends, strict=True))
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(ranges)}"


@dataclass(frozen=True, slots=True)
class RewindState:
    """What is stored with each version about rewinds, so that a fault neither loses nor repeats one.

    Args:
        asked: what the script has asked for and was not decided yet.
        past: the rewinds since the run last made progress.
        sends_replicas: whether replicas are sent, because the ranks were found to differ.
    """

    asked: tuple[RewindAsked, ...] = ()
    past: PastRewinds = PastRewinds()
    sends_replicas: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        asked = [asdict(each) for each in self.asked]
        return {"asked": asked, "past": asdict(self.past), "sends_replicas": self.sends_replicas}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """Return what `to_dict` was called on."""
        asked = tuple(RewindAsked(**each) for each in saved["asked"])
        return cls(asked, PastRewinds(**saved["past"]), saved["sends_replicas"])
