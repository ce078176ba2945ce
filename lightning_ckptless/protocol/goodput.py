"""Goodput accounting: time spent in productive steps, and time lost by cause.

Goodput is the time of productive steps divided by the wall time since the run started. The account is mirrored with the
state. When a version is restored, its account is restored too, so it does not contain the steps that were rolled back,
and the time since then is the cost of the fault. That time is split as follows:

    last productive step | discarded work | detect abort regroup restore | replayed step
                         ^                ^                              ^
                         counted_until    fault                          first step after the fault starts

The replayed step is productive. The work discarded before the fault, and the time between the restore and the replayed
step, are lost to `REPLAY`. The phases of a recovery, in contrast, are what a user observes: they last from the fault to
the end of the first step after it, and `replay_s` includes that step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self


class Loss(StrEnum):
    """A cause of lost time. `OTHER` is the remainder: startup, validation, checkpoint files, shutdown."""

    DETECT = "detect"
    ABORT = "abort"
    REGROUP = "regroup"
    RESTORE = "restore"
    REPLAY = "replay"
    MIRROR_STALL = "mirror_stall"
    REWIND = "rewind"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Phases:
    """The phases of one recovery, in seconds.

    Args:
        detect_s: from the fault to its detection.
        abort_s: from then until all workers had stopped.
        regroup_s: from then until the new generation had completed its rendezvous.
        restore_s: from then until the state was restored.
        replay_s: from then until the first step was done on all ranks.
        other_s: time that belongs to no phase because an instant between two phases is unknown.
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
        """From the fault until the state was restored."""
        return self.detect_s + self.abort_s + self.regroup_s + self.restore_s + self.other_s


PHASE_FIELDS = tuple(entry.name for entry in fields(Phases))
PHASES = tuple(name.removesuffix("_s") for name in PHASE_FIELDS)


def phases_from(
    *,
    fault_at: float | None,
    detected_at: float | None,
    stopped_at: float | None,
    regrouped_at: float | None,
    restored_at: float | None,
    first_step_done_at: float | None,
) -> Phases:
    """Split a recovery into phases by the instants at which they ended.

    If an instant is unknown, the time between its neighbours goes to `other_s`. An instant before its predecessor,
    which happens if the clocks of two nodes differ, is moved to its predecessor. So the phases always sum to the time
    between the first and the last known instant.

    Args:
        fault_at: instant of the fault. All instants are in seconds, and None if unknown.
        detected_at: when the fault was detected.
        stopped_at: when all workers had stopped.
        regrouped_at: when the new generation had completed its rendezvous.
        restored_at: when the state was restored.
        first_step_done_at: when the first step after the fault was done.
    """
    instants = (fault_at, detected_at, stopped_at, regrouped_at, restored_at, first_step_done_at)
    spans = dict.fromkeys(PHASE_FIELDS, 0.0)
    known = [(index, instant) for index, instant in enumerate(instants) if instant is not None]
    if not known:
        return Phases()
    last_index, last_instant = known[0]
    for index, instant in known[1:]:
        name = PHASE_FIELDS[last_index] if index == last_index + 1 else "other_s"
        spans[name] += max(0.0, instant - last_instant)
        last_index, last_instant = index, max(last_instant, instant)
    return Phases(**spans)


@dataclass(frozen=True, slots=True)
class GoodputReport:
    """The account at an instant.

    Args:
        goodput: productive time / wall time; 0 if no time has passed.
        productive_s: time of productive steps, in seconds.
        lost: seconds lost by cause; together with `productive_s` they sum to `wall_s`.
        wall_s: seconds since the run started.
    """

    goodput: float
    productive_s: float
    lost: Mapping[Loss, float]
    wall_s: float


@dataclass(slots=True)
class GoodputAccount:
    """Adds up the time of a run. All instants are in seconds of one clock that outlives the process.

    Args:
        began_at: when the run started.
        productive_s: time of productive steps, in seconds.
        counted_until: end of the last productive step; None before the first.
        recoveries: number of recoveries.
        lost_s: seconds lost so far by cause, except `OTHER`.
    """

    began_at: float
    productive_s: float = 0.0
    counted_until: float | None = None
    recoveries: int = 0
    lost_s: dict[Loss, float] = field(default_factory=dict)
    _resumed: bool = False
    _outage_s: float = 0.0

    def record_step(self, start: float, end: float, stall_s: float = 0.0) -> None:
        """Record a step.

        Args:
            start: when it started.
            end: when it ended.
            stall_s: seconds of it spent waiting for the mirror.
        """
        if self._resumed:
            since = self.began_at if self.counted_until is None else self.counted_until
            self._outage_s, self._resumed = max(0.0, start - since), False
        # If the clock was set back the duration is negative: the step counts as 0 s.
        spent_s = max(0.0, end - start)
        stall_s = min(stall_s, spent_s)
        self.productive_s += spent_s - stall_s
        self._lose(Loss.MIRROR_STALL, stall_s)
        self.counted_until = end

    def record_recovery(self, phases: Phases) -> None:
        """Record a recovery, after the first step that follows it.

        Args:
            phases: phases of the recovery. `replay_s` and `other_s` are not used; see the module docstring.
        """
        self.recoveries += 1
        self._lose(Loss.DETECT, phases.detect_s)
        self._lose(Loss.ABORT, phases.abort_s)
        self._lose(Loss.REGROUP, phases.regroup_s)
        self._lose(Loss.RESTORE, phases.restore_s)
        self._lose(Loss.REPLAY, max(0.0, self._outage_s - phases.down_s))
        self._outage_s = 0.0

    def rewind_to(self, productive_s: float) -> None:
        """Record that all ranks go back to an earlier version: the steps since then are lost.

        Args:
            productive_s: time of productive steps according to that version.
        """
        self._lose(Loss.REWIND, self.productive_s - productive_s)
        self.productive_s, self._resumed = productive_s, True

    def record_rewind(self) -> None:
        """Record the time from the last step before a rewind to the first one after it."""
        self._lose(Loss.REWIND, self._outage_s)
        self._outage_s = 0.0

    def report(self, now: float) -> GoodputReport:
        """Close the account at an instant."""
        wall_s = now - self.began_at
        lost = {loss: self.lost_s.get(loss, 0.0) for loss in Loss}
        lost[Loss.OTHER] = wall_s - self.productive_s - sum(lost.values())
        return GoodputReport(self.productive_s / wall_s if wall_s > 0 else 0.0, self.productive_s, lost, wall_s)

    def to_dict(self) -> dict[str, Any]:
        """The account as plain values, to be mirrored with its version."""
        return {
            "began_at": self.began_at,
            "productive_s": self.productive_s,
            "counted_until": self.counted_until,
            "recoveries": self.recoveries,
            "lost_s": {str(loss): lost_s for loss, lost_s in self.lost_s.items()},
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """The account of a restored version. The time until its first step counts as an outage."""
        lost_s = {Loss(name): lost_s for name, lost_s in saved["lost_s"].items()}
        return cls(**{**saved, "lost_s": lost_s}, _resumed=True)

    def _lose(self, loss: Loss, lost_s: float) -> None:
        self.lost_s[loss] = self.lost_s.get(loss, 0.0) + lost_s
