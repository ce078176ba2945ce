"""What a generation does when it starts: go on, begin, read a checkpoint file, or refuse.

The decision is a cascade, from what must not happen to what is left:

| Arenas | And | Then |
|---|---|---|
| a complete version | of another world size | refuse |
| a complete version | first start, asked for another checkpoint file than the one it began from | refuse |
| a complete version | | restore it |
| no complete version | nothing of this run was ever committed | begin anew |
| no complete version | a checkpoint file is there and may be used | go on from the file |
| no complete version | | refuse |

A run that has committed something is never begun anew in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.errors import CkptlessError, OptionsError, StateMissingError, WorldSizeError
from lightning_ckptless.options import OnUnrecoverable
from lightning_ckptless.protocol.versions import Complete, Missing


class StartAction(StrEnum):
    """What a generation does when it starts."""

    FRESH = "fresh"
    RESTORE = "restore"
    DURABLE = "durable"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class StartPlan:
    """What a generation does, and why.

    Args:
        action: what to do.
        reason: why, in a sentence; the message of the error where there is one.
        ckpt_path: checkpoint file to load: the user's with `FRESH`, the newest one with `DURABLE`; None for none.
        error: the exception to raise; None unless the action is `REFUSE`.
    """

    action: StartAction
    reason: str
    ckpt_path: str | None = None
    error: type[CkptlessError] | None = None


def plan_start(
    *,
    found: Complete | Missing,
    generation: int,
    world_size: int,
    relaunched: bool,
    had_commit: bool,
    ckpt_path: str | None,
    origin: str | None,
    durable: str | None,
    on_unrecoverable: OnUnrecoverable,
) -> StartPlan:
    """Decide what a generation does.

    Args:
        found: what the arenas hold.
        generation: number of this membership.
        world_size: number of ranks now.
        relaunched: whether this generation follows another one of the same start.
        had_commit: whether any version of this run was ever committed; True where nobody can tell.
        ckpt_path: checkpoint file that the user asked for at this start.
        origin: checkpoint file that the run in the arenas began from.
        durable: newest checkpoint file of the run; None where there is none.
        on_unrecoverable: what to do without a complete version.
    """
    if isinstance(found, Complete):
        if found.snapshot.world_size != world_size:
            return _refuse(WorldSizeError, _other_world_size(found, world_size))
        if not relaunched and ckpt_path is not None and ckpt_path != origin:
            return _refuse(OptionsError, _other_origin(found, ckpt_path, origin))
        return StartPlan(StartAction.RESTORE, f"generation {generation} goes on: {found.reason}")
    if not had_commit:
        return StartPlan(StartAction.FRESH, _nothing_to_lose(found, generation, relaunched, ckpt_path), ckpt_path)
    lost = _lost(found, generation)
    if on_unrecoverable == "durable" and durable is not None:
        return StartPlan(StartAction.DURABLE, f"{lost}; it goes on from the newest checkpoint file, {durable}", durable)
    return _refuse(StateMissingError, f"{lost}; {_no_rung_left(on_unrecoverable, durable)}")


def _refuse(error: type[CkptlessError], reason: str) -> StartPlan:
    return StartPlan(StartAction.REFUSE, reason, error=error)


def _other_world_size(found: Complete, world_size: int) -> str:
    before = found.snapshot.world_size
    return (
        f"{found.snapshot.version} was mirrored by {before} ranks, and {world_size} are started: "
        f"start {before} ranks, or remove the mirrored state with `ckptless clean`"
    )


def _other_origin(found: Complete, ckpt_path: str, origin: str | None) -> str:
    began = "without a checkpoint file" if origin is None else f"from {origin}"
    same = "leave ckpt_path out" if origin is None else f"pass ckpt_path={origin!r}"
    return (
        f"ckpt_path={ckpt_path!r}, but the arenas hold {found.snapshot.version} of a run that began {began}: "
        f"{same} to go on with that run, or remove it with `ckptless clean`"
    )


def _nothing_to_lose(found: Missing, generation: int, relaunched: bool, ckpt_path: str | None) -> str:
    begin = "from the start" if ckpt_path is None else f"from {ckpt_path}"
    if relaunched:
        return (
            f"generation {generation} begins {begin}: no generation before it has committed a version ({found.reason})"
        )
    return f"{found.reason}: a new run, generation {generation} begins {begin}"


def _lost(found: Missing, generation: int) -> str:
    return f"generation {generation} finds no state to go on from, though the run has committed some: {found.reason}"


def _no_rung_left(on_unrecoverable: str, durable: str | None) -> str:
    if durable is not None:
        fix = f"ckpt_path={durable!r} and another run id begin from the newest file"
        return f"on_unrecoverable={on_unrecoverable!r} forbids to go on from a checkpoint file: {fix}"
    return "no checkpoint file of the run was found: begin again with `ckptless clean` or another run id"
