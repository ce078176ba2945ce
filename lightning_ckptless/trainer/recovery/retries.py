"""Decisions that a worker makes itself: whether an exception of the script is final, and how often to recover."""

from __future__ import annotations

import time

from lightning_ckptless.errors import CkptlessError, LaunchError, UnevenStepsError
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.retry_policy import RecoveryHistory, RecoveryLimits, why_no_recovery
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.arena_notes import ArenaNotes, RecoveryRecord
from lightning_ckptless.trainer.session.member_set import MemberSet


def why_final(error: Exception, *, rank: int, taken: Version | None, arena: Arena | None) -> str | None:
    """Why an exception is not worth a retry; None for the first of its kind at a step, which is recorded.

    If another rank of this node has raised the same a second time, the run ends: then the first one of this rank is
    final, too, and its loggers learn that the run has failed.

    Args:
        error: the exception.
        rank: rank that raised it.
        taken: the last version before it; None if training had not begun.
        arena: stores what was raised before; None if there is none yet.
    """
    if isinstance(error, UnevenStepsError):
        return str(error)
    if isinstance(error, CkptlessError) and not isinstance(error, OSError):
        return "a retry would end the same way"
    if taken is None or arena is None:
        return "it was raised before the first step"
    mark = f"{type(error).__name__} after step {taken.optimizer_step}"
    raised, again = arena.notes().raised, f"{mark}, again"
    if raised.get(rank) == mark or again in raised.values():
        arena.write_notes(ArenaNotes(raised={rank: again}))
        return f"{mark} was raised again after a recovery: the cause is in the script, not in the hardware"
    arena.write_notes(ArenaNotes(raised={rank: mark}))
    return None


def count_recovery(members: MemberSet, restored: Version, options: CkptlessOptions) -> None:
    """Count a recovery over all relaunches of the run. Used under an external agent, which does not know the limits.

    Args:
        members: the member set.
        restored: version that the run resumes from.
        options: the user's settings.

    Raises:
        LaunchError: the limit on recoveries has been reached.
    """
    recorded = [notes.recoveries for notes in members.notes if notes.recoveries is not None]
    newest = max(recorded, key=lambda record: record.history.count, default=None)
    history = RecoveryHistory() if newest is None else newest.history
    if newest is not None and restored.optimizer_step > newest.step:
        history = history.after_progress()
    limits, now = RecoveryLimits(options.max_recoveries_without_progress, options.max_recoveries_per_hour), time.time()
    why_not = why_no_recovery(history, limits, now)
    if why_not is not None:
        raise LaunchError(
            f"rank {members.rank}: {why_not}. Look for the cause in the run's ledger; with a higher limit the run "
            "resumes from the arenas"
        )
    if members.is_node_leader:
        newest = RecoveryRecord(history.after_recovery(now), restored.optimizer_step)
        members.arena.write_notes(ArenaNotes(recoveries=newest))
