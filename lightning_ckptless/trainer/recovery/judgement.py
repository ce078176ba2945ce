"""What a worker judges itself: what an exception of the program's means for the run, and how often it may recover."""

from __future__ import annotations

import time
from dataclasses import asdict

from lightning_ckptless.errors import CkptlessError, LaunchError, UnevenStepsError
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.retry_policy import RecoveryHistory, RecoveryLimits, why_no_recovery
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.trainer.session.member_set import MemberSet


def why_final(error: Exception, *, rank: int, taken: Version | None, arena: Arena | None) -> str | None:
    """Why an exception is not worth another try; None for the first of its kind at a step, which is noted.

    Args:
        error: what was raised.
        rank: where.
        taken: the last version before it; None where training had not begun.
        arena: remembers what was raised before; None where there is none yet.
    """
    if isinstance(error, UnevenStepsError):
        return str(error)
    if isinstance(error, CkptlessError):
        return "another try would end the same way"
    if taken is None or arena is None:
        return "it was raised before the first step"
    mark = f"{type(error).__name__} after step {taken.optimizer_step}"
    name = f"raised by rank {rank}"
    if arena.notes().get(name) == mark:
        return f"{mark} was raised again after a recovery: it is the program's, not the machine's"
    arena.note(name, mark)
    return None


def count_recovery(members: MemberSet, restored: Version, options: CkptlessOptions) -> None:
    """Count a recovery over all starts of the run: an agent that is not ours does not know the user's limits.

    Args:
        members: the ranks.
        restored: the version that they continue from.
        options: the user's settings.

    Raises:
        LaunchError: as many recoveries were made as the options allow.
    """
    noted = max((notes.get("recoveries", {}) for notes in members.notes), key=lambda note: note.get("count", 0))
    history = RecoveryHistory.from_note(noted) if noted else RecoveryHistory()
    if restored.optimizer_step > noted.get("step", -1):
        history = history.after_progress()
    limits, now = RecoveryLimits(options.max_recoveries_without_progress, options.max_recoveries_per_hour), time.time()
    why_not = why_no_recovery(history, limits, now)
    if why_not is not None:
        raise LaunchError(
            f"rank {members.rank}: {why_not}. Look for the cause in the run's ledger; a higher limit continues from "
            "the arenas"
        )
    if members.speaks_for_node:
        note = asdict(history.after_recovery(now)) | {"step": restored.optimizer_step}
        members.arena.note("recoveries", note)
