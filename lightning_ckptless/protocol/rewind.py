"""Rewinding: which version all ranks go back to, decided from their requests and the contents of their arenas.

Ranks may request different steps, or only one of them may request a rewind: a spike is often seen by one rank only. All
ranks gather the requests at one step and decide with the same function, so that the run is never split.

A rewind that does not help is requested again. Therefore a rewind requested before the run has progressed beyond the
previous one goes back twice as far, and the fourth in a row ends the run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

from lightning_ckptless.protocol.versions import Version

MOST_IN_A_ROW = 3
"""Maximum number of rewinds without progress beyond the step at which the first was requested."""


@dataclass(frozen=True, slots=True)
class RewindAsked:
    """A rewind requested by a rank.

    Args:
        step: optimizer step to return to.
        at_step: optimizer step at which it was requested.
        skip_batches: batches of each rank to skip from there on.
        skip_to_batch: number of a batch of a rank, counted from the start of the run, up to which the batches after the
        version are skipped; 0 for none.
        cause: who requested it, and why.
        request: number of the request from another terminal; 0 for a request of the script.
    """

    step: int
    at_step: int
    skip_batches: int = 0
    skip_to_batch: int = 0
    cause: str = "requested by the script"
    request: int = 0


@dataclass(frozen=True, slots=True)
class PastRewinds:
    """The rewinds since the run last made progress.

    Args:
        count: number of them.
        at_step: optimizer step at which the latest was requested: progress begins after it.
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
        is_answer: whether it answers the requests of ranks; otherwise these are still undecided.
    """

    version: Version
    from_step: int
    skip_batches: int
    skip_to_batch: int
    past: PastRewinds
    reason: str
    is_answer: bool = True

    def batches_to_skip(self, done: int, left: int) -> int:
        """The number of batches of each rank to skip; at least one batch of the epoch remains.

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
    """Decide on the requests of the ranks.

    The earliest target counts, with its skips. Requests that arrive before the decision often have the same cause: a
    loss stays NaN.

    Args:
        asked: the requests of all ranks; at least one.
        kept: the complete versions in the arenas of all ranks.
        from_step: the last optimizer step that all ranks have completed.
        past: the rewinds since the run last made progress.
    """
    earliest = min(asked, key=lambda each: each.step)
    at_step = max(each.at_step for each in asked)
    count = past.count if at_step <= past.at_step else 0
    ends_run = not all(each.request for each in asked)
    if count >= MOST_IN_A_ROW:
        return NoRewind(_too_many(count, at_step, earliest), ends_run=True)
    if earliest.step > from_step:
        reason = f"cannot go back to step {earliest.step}: the newest step is {from_step}"
        return NoRewind(reason, ends_run)
    wanted = earliest.step if not count else min(earliest.step, past.to_step - max(1, at_step - past.to_step))
    reachable = [version for version in kept if version.optimizer_step <= wanted]
    if not reachable and count:
        # If the history does not reach twice as far, go back as far as possible, if that is further than before.
        most = min(earliest.step, past.to_step - 1)
        reachable = sorted(version for version in kept if version.optimizer_step <= most)[:1]
    if not reachable:
        is_known = any(version.optimizer_step <= earliest.step for version in kept)
        reason = _too_many(count, at_step, earliest) if is_known else _beyond(earliest, kept)
        return NoRewind(reason, ends_run or bool(count))
    version, first = max(reachable), [each for each in asked if each.step == earliest.step]
    return RewindPlan(
        version=version,
        from_step=from_step,
        skip_batches=max(each.skip_batches for each in first),
        skip_to_batch=max(each.skip_to_batch for each in first),
        past=PastRewinds(count + 1, at_step, version.optimizer_step),
        reason=_why(earliest, version, from_step, count, len(asked)),
    )


def _why(earliest: RewindAsked, version: Version, from_step: int, count: int, ranks: int) -> str:
    others = f", the earliest of {ranks} requests" if ranks > 1 else ""
    nearest = "" if version.optimizer_step == earliest.step else f" instead of step {earliest.step}"
    again = (
        f"; rewind {count + 1} of at most {MOST_IN_A_ROW} without progress, so it goes further back" if count else ""
    )
    return f"from step {from_step} back to {version}{nearest}: {earliest.cause}{others}{again}"


def _beyond(earliest: RewindAsked, kept: Collection[Version]) -> str:
    return (
        f"cannot go back to step {earliest.step}: the history has {steps_of(kept)}. Choose one of these, or increase "
        "history= (versions kept) or history_every= (steps between them)"
    )


def _too_many(count: int, at_step: int, earliest: RewindAsked) -> str:
    times = "once" if count == 1 else f"{count} times in a row"
    return (
        f"the run was rewound {times} without getting beyond step {at_step}, and now again: {earliest.cause}. "
        "Rewinding does not help: lower the learning rate, clip the gradients, skip more batches or remove the data at "
        "this step, and restart"
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
    """The state of rewinds, stored with each version so that a fault neither loses nor repeats one.

    Args:
        asked: undecided requests of the script.
        past: the rewinds since the run last made progress.
        sends_replicas: whether replicas are sent, because the ranks were found to differ.
    """

    asked: tuple[RewindAsked, ...] = ()
    past: PastRewinds = PastRewinds()
    sends_replicas: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        asked = [asdict(each) for each in self.asked]
        return {"asked": asked, "past": asdict(self.past), "sends_replicas": self.sends_replicas}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """Return the result of `to_dict` as an object."""
        asked = tuple(RewindAsked(**each) for each in saved["asked"])
        return cls(asked, PastRewinds(**saved["past"]), saved["sends_replicas"])
