"""What an exception of the program's means for the run."""

from __future__ import annotations

from lightning_ckptless.errors import CkptlessError, UnevenStepsError
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import Arena


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
