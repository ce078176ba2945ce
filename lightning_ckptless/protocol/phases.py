"""The phases of a recovery: what a user observes from a fault to the end of the first step after it.

`replay` includes that step. The account of the run's time (`time_account`) counts it as training instead.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


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
