"""Where the time of a run went: productive steps, and what was lost to what.

Goodput is the time of the steps that count, divided by the wall time since the run began. The account travels with the
mirrored state: when a version is restored, its account is restored too, so the steps that were rolled back are not in
it, and the time since then is what the fault cost. That time is split like this:

    last step that counts | thrown away | detect abort regroup restore | the step, run again
                          ^             ^                              ^
                          counted_until fault                          first step after it begins

The step that is run again counts: it is productive. What was thrown away before the fault, and the time between the
restore and that step, are lost to `REPLAY`. The phases of a recovery, on the other hand, are what somebody who waits
sees: from the fault to the end of the first step after it, with that step in `replay_s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self


class Loss(StrEnum):
    """What time was lost to. `OTHER` is what is left: start-up, validation, checkpoint files, the end."""

    DETECT = "detect"
    ABORT = "abort"
    REGROUP = "regroup"
    RESTORE = "restore"
    REPLAY = "replay"
    MIRROR_STALL = "mirror_stall"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Phases:
    """The phases of one recovery, in seconds.

    Args:
        detect_s: from the fault until it was seen.
        abort_s: until all workers had stopped.
        regroup_s: until the new generation had met.
        restore_s: until the state was in place.
        replay_s: until the first step was done on all ranks.
        other_s: what lies between two instants of which one is not known.
    """

    detect_s: float = 0.0
    abort_s: float = 0.0
    regroup_s: float = 0.0
    restore_s: float = 0.0
    replay_s: float = 0.0
    other_s: float = 0.0

    @property
    def total_s(self) -> float:
        """From the fault to the end of the first step after it."""
        return self.down_s + self.replay_s

    @property
    def down_s(self) -> float:
        """From the fault until the state was in place."""
        return self.detect_s + self.abort_s + self.regroup_s + self.restore_s + self.other_s


def phases_from(
    *,
    fault_at: float | None,
    detected_at: float | None,
    stopped_at: float | None,
    regrouped_at: float | None,
    restored_at: float | None,
    first_step_done_at: float | None,
) -> Phases:
    """Split a recovery by the instants at which its phases ended.

    An instant that is not known leaves the time between its neighbours to `other_s`. One that lies before its
    predecessor, as clocks of two nodes may have it, is moved there. So the phases always sum to the time between the
    first and the last known instant.

    Args:
        fault_at: seconds, as all others; None where it is not known, as with all others.
        detected_at: when the fault was seen.
        stopped_at: when all workers had stopped.
        regrouped_at: when the new generation had met.
        restored_at: when the state was in place.
        first_step_done_at: when the first step after the fault was done.
    """
    instants = (fault_at, detected_at, stopped_at, regrouped_at, restored_at, first_step_done_at)
    names = [name.name for name in fields(Phases)]
    spans = dict.fromkeys(names, 0.0)
    known = [(place, instant) for place, instant in enumerate(instants) if instant is not None]
    if not known:
        return Phases()
    last_place, last_instant = known[0]
    for place, instant in known[1:]:
        name = names[last_place] if place == last_place + 1 else "other_s"
        spans[name] += max(0.0, instant - last_instant)
        last_place, last_instant = place, max(last_instant, instant)
    return Phases(**spans)


@dataclass(frozen=True, slots=True)
class GoodputReport:
    """The account, closed at some instant.

    Args:
        goodput: productive time / wall time; 0 where no time has passed.
        productive_s: time of the steps that count.
        lost: seconds lost, by what they were lost to; they and `productive_s` sum to `wall_s`.
        wall_s: time since the run began.
    """

    goodput: float
    productive_s: float
    lost: Mapping[Loss, float]
    wall_s: float


@dataclass(slots=True)
class GoodputAccount:
    """Adds up the time of a run. All instants are seconds of one clock that outlives the process.

    Args:
        began_at: when the run began.
        productive_s: time of the steps that count.
        counted_until: end of the last step that counts; the beginning of the run before the first.
        recoveries: number of recoveries.
        lost_s: time lost so far, but for `OTHER`.
    """

    began_at: float
    productive_s: float = 0.0
    counted_until: float | None = None
    recoveries: int = 0
    lost_s: dict[Loss, float] = field(default_factory=dict)
    _resumed: bool = False
    _outage_s: float = 0.0

    def record_step(self, start: float, end: float, stall_s: float = 0.0) -> None:
        """Count a step.

        Args:
            start: when it began.
            end: when it ended.
            stall_s: how long it waited for the mirror in between.
        """
        if self._resumed:
            since = self.began_at if self.counted_until is None else self.counted_until
            self._outage_s, self._resumed = max(0.0, start - since), False
        # A clock that is set back makes a step of less than nothing; it counts nothing.
        spent_s = max(0.0, end - start)
        stall_s = min(stall_s, spent_s)
        self.productive_s += spent_s - stall_s
        self._lose(Loss.MIRROR_STALL, stall_s)
        self.counted_until = end

    def record_recovery(self, phases: Phases) -> None:
        """Account for a recovery, once the first step after it was recorded.

        Args:
            phases: of the recovery; `replay_s` and `other_s` are not used, see the head of this module.
        """
        self.recoveries += 1
        self._lose(Loss.DETECT, phases.detect_s)
        self._lose(Loss.ABORT, phases.abort_s)
        self._lose(Loss.REGROUP, phases.regroup_s)
        self._lose(Loss.RESTORE, phases.restore_s)
        self._lose(Loss.REPLAY, max(0.0, self._outage_s - phases.down_s))
        self._outage_s = 0.0

    def report(self, now: float) -> GoodputReport:
        """Close the account at an instant."""
        wall_s = now - self.began_at
        lost = {loss: self.lost_s.get(loss, 0.0) for loss in Loss}
        lost[Loss.OTHER] = wall_s - self.productive_s - sum(lost.values())
        return GoodputReport(self.productive_s / wall_s if wall_s > 0 else 0.0, self.productive_s, lost, wall_s)

    def to_dict(self) -> dict[str, Any]:
        """The account as plain values, to be mirrored with the version it belongs to."""
        return {
            "began_at": self.began_at,
            "productive_s": self.productive_s,
            "counted_until": self.counted_until,
            "recoveries": self.recoveries,
            "lost_s": {str(loss): lost_s for loss, lost_s in self.lost_s.items()},
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """The account of a restored version. The time up to its first step is taken for an outage."""
        lost_s = {Loss(name): lost_s for name, lost_s in saved["lost_s"].items()}
        return cls(**{**saved, "lost_s": lost_s}, _resumed=True)

    def _lose(self, loss: Loss, lost_s: float) -> None:
        self.lost_s[loss] = self.lost_s.get(loss, 0.0) + lost_s
