"""Stragglers: which rank is one, and whether its process is replaced.

Each rank measures its own time per step, without waiting for others. The slowest rank is a straggler if that time is a
multiple of the other ranks' median, and noticeably longer. The first row that applies decides:

| A straggler | Then |
|---|---|
| and draining of stragglers is disabled | report |
| for less than the configured time | wait |
| and a rank of its node is being drained | wait |
| within an hour of the last straggler drained on its node | wait |
| | drain |

A process that has just taken a rank may be slow until it has warmed up. As a new process, its time as a straggler
starts from zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.options import DrainOptions

FACTOR: float = DrainOptions.straggler_factor
"""Own time per step above which a rank is a straggler, as a multiple of the other ranks' median."""
LEAST_LAG_S = 0.01
"""Smaller differences between the steps of two ranks are noise."""
DRAIN_EVERY_S = 3600.0
"""Minimum time between two stragglers drained on a node."""


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank that is slower than the others.

    Args:
        rank: the rank.
        own_s: its own time per step, in seconds.
        others_s: the median of the others.
    """

    rank: int
    own_s: float
    others_s: float

    @property
    def ratio(self) -> float:
        """Its time as a multiple of the others' median."""
        return self.own_s / self.others_s

    def __str__(self) -> str:
        """Its time per step, compared with the others."""
        return f"takes {1e3 * self.own_s:.1f} ms per step, {self.ratio:.1f}x the median of the others"


@dataclass(frozen=True, slots=True)
class StragglerOptions:
    """The user's settings.

    Args:
        factor: multiple of the others' median from which a rank is a straggler.
        drain_after_s: how long a rank must be one until its process is replaced; None for never.
    """

    factor: float = FACTOR
    drain_after_s: float | None = None


class StragglerAction(StrEnum):
    """How a straggler is handled; see the table above."""

    REPORT = "report"
    WAIT = "wait"
    DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class StragglerPlan:
    """How a straggler is handled, and why.

    Args:
        rank: the straggler.
        action: see there.
        reason: why, in a sentence.
    """

    rank: int
    action: StragglerAction
    reason: str


def find_straggler(own_s: Mapping[int, float], factor: float = FACTOR) -> Straggler | None:
    """Return the straggler; None if there is none.

    Args:
        own_s: own time of each rank per step, in seconds; 0 if unknown.
        factor: multiple of the others' median from which a rank is one.
    """
    known = {rank: seconds for rank, seconds in own_s.items() if seconds > 0}
    if len(known) < 2:
        return None
    slowest = max(known, key=lambda rank: known[rank])
    others_s = _median([seconds for rank, seconds in known.items() if rank != slowest])
    found = Straggler(slowest, known[slowest], others_s)
    return found if found.ratio >= factor and found.own_s - others_s >= LEAST_LAG_S else None


def plan_straggler(
    straggler: Straggler, options: StragglerOptions, *, since_s: float, drained_s: float | None, is_draining: bool
) -> StragglerPlan:
    """Decide how to handle a straggler.

    Args:
        straggler: the rank.
        options: the user's settings.
        since_s: how long its process has been a straggler, in seconds.
        drained_s: seconds since the last straggler of its node was drained; None if none was.
        is_draining: whether a rank of its node is being drained.
    """
    rank, after_s = straggler.rank, options.drain_after_s
    found = f"rank {rank} {straggler}"
    if after_s is None:
        advice = "drain_stragglers_after_s is not set; with a time, another process would take the rank after it"
        return StragglerPlan(rank, StragglerAction.REPORT, f"{found}; {advice}")
    if since_s < after_s:
        wait = f"for {since_s:.1f} s; another process takes the rank after {after_s:g} s"
        return StragglerPlan(rank, StragglerAction.WAIT, f"{found} {wait}")
    if is_draining:
        return StragglerPlan(rank, StragglerAction.WAIT, f"{found}; a rank of its node is being drained")
    if drained_s is not None and drained_s < DRAIN_EVERY_S:
        wait = f"the last straggler of its node was drained {drained_s:.0f} s ago, which is done once an hour at most"
        return StragglerPlan(rank, StragglerAction.WAIT, f"{found}; {wait}")
    return StragglerPlan(rank, StragglerAction.DRAIN, f"straggler: {found} for {since_s:.1f} s")


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
