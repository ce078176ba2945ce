"""How often a run may recover: without end while it makes progress, and only a few times where it makes none.

A run of a month on many machines meets many faults, and each costs it a step. A limit is there for the run that comes
back to the same fault: it commits no new step between its recoveries, or it recovers more often than machines fail.

| The run | Then |
|---|---|
| has recovered as often as its launcher allows in all | end |
| has recovered as often as is allowed with no new step committed since | end |
| has recovered as often as is allowed within the last hour | end |
| | recover |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class RecoveryLimits:
    """What a user allows.

    Args:
        without_progress: recoveries with no new step committed between them.
        per_hour: recoveries within any hour.
        in_all: recoveries in the life of an agent; None for any number.
    """

    without_progress: int = 10
    per_hour: int = 100
    in_all: int | None = None


@dataclass(frozen=True, slots=True)
class RecoveryHistory:
    """The recoveries of a run so far.

    Args:
        count: how many there were.
        without_progress: how many of them since the last new step was committed.
        recent: when those of the last hour were, in seconds of one clock.
    """

    count: int = 0
    without_progress: int = 0
    recent: tuple[float, ...] = ()

    def after_progress(self) -> RecoveryHistory:
        """The history once a new step has been committed."""
        return replace(self, without_progress=0)

    def after_recovery(self, at: float) -> RecoveryHistory:
        """The history with one more recovery."""
        recent = (*(earlier for earlier in self.recent if earlier > at - HOUR_S), at)
        return RecoveryHistory(self.count + 1, self.without_progress + 1, recent)

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> Self:
        """The history that was noted as a dictionary of its fields."""
        return cls(note["count"], note["without_progress"], tuple(note["recent"]))

    def __str__(self) -> str:
        return f"recovery {self.count} of the run, {self.without_progress} without a new step"


def why_no_recovery(history: RecoveryHistory, limits: RecoveryLimits, now: float) -> str | None:
    """Why a run may not recover once more; None where it may.

    Args:
        history: its recoveries so far.
        limits: what its user allows.
        now: seconds of the clock of the history.
    """
    if limits.in_all is not None and history.count >= limits.in_all:
        return f"no recovery is left: the run has had {history.count}, and the launcher's --max-restarts allows no more"
    if history.without_progress >= limits.without_progress:
        return (
            f"no recovery is left: the run has had {history.without_progress} with no new step committed since, and "
            f"max_recoveries_without_progress={limits.without_progress} allows no more: it comes back to the same fault"
        )
    within = [at for at in history.recent if at > now - HOUR_S]
    if len(within) >= limits.per_hour:
        return (
            f"no recovery is left: the run has had {len(within)} within the last {now - within[0]:.0f} s, and "
            f"max_recoveries_per_hour={limits.per_hour} allows no more"
        )
    return None
