"""Retry policy: a run may recover any number of times while it makes progress, and a few times without progress.

A month-long run on many nodes has many faults, each of which costs a step. The limits are for a run that keeps hitting
the same fault: it commits no new step between recoveries, or it recovers more often than nodes fail.

| The run | Then |
|---|---|
| has reached the launcher's limit on recoveries in total | end |
| has reached the limit on recoveries without a new committed step | end |
| has reached the limit on recoveries within the last hour | end |
| | recover |
"""

from __future__ import annotations

from dataclasses import dataclass, replace

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class RecoveryLimits:
    """The limits that the user sets.

    Args:
        without_progress: recoveries without a new committed step between them.
        per_hour: recoveries within any hour.
        in_all: recoveries during the lifetime of an agent; None for any number.
    """

    without_progress: int = 10
    per_hour: int = 100
    in_all: int | None = None


@dataclass(frozen=True, slots=True)
class RecoveryHistory:
    """The recoveries of a run so far.

    Args:
        count: number of recoveries.
        without_progress: number of recoveries since the last new step was committed.
        recent: instants of the recoveries within the last hour, in seconds of one clock.
    """

    count: int = 0
    without_progress: int = 0
    recent: tuple[float, ...] = ()

    def after_progress(self) -> RecoveryHistory:
        """The history after a new step was committed."""
        return replace(self, without_progress=0)

    def after_recovery(self, at: float) -> RecoveryHistory:
        """The history with one more recovery."""
        recent = (*(earlier for earlier in self.recent if earlier > at - HOUR_S), at)
        return RecoveryHistory(self.count + 1, self.without_progress + 1, recent)

    def __str__(self) -> str:
        return f"recovery {self.count} of the run, {self.without_progress} without a new step"


def why_no_recovery(history: RecoveryHistory, limits: RecoveryLimits, now: float) -> str | None:
    """Why a run may not recover again; None if it may.

    Args:
        history: its recoveries so far.
        limits: limits set by the user.
        now: current time on the clock of the history, in seconds.
    """
    if limits.in_all is not None and history.count >= limits.in_all:
        return f"no recovery is left: the run had {history.count}, and the launcher's --max-restarts allows no more"
    if history.without_progress >= limits.without_progress:
        return (
            f"no recovery is left: the run had {history.without_progress} without a new committed step, and "
            f"max_recoveries_without_progress={limits.without_progress} allows no more: it keeps hitting the same fault"
        )
    within = [at for at in history.recent if at > now - HOUR_S]
    if len(within) >= limits.per_hour:
        return (
            f"no recovery is left: the run had {len(within)} within the last {now - within[0]:.0f} s, and "
            f"max_recoveries_per_hour={limits.per_hour} allows no more"
        )
    return None
