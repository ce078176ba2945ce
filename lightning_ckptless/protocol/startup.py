"""What a generation does when it starts: go on, begin, read a durable state or a checkpoint file, or refuse.

The decision is a cascade. Of what the run has left, the newest is taken: by optimizer step, and what holds the position
exactly before what does not.

| Arenas | And | Then |
|---|---|---|
| a complete version, as new as any durable state | first start, asked for another checkpoint file than the one it began from | refuse |
| a complete version, as new as any durable state | | restore it |
| no complete version, or an older one | a durable state, first start, asked for another checkpoint file, whose step is not known | refuse |
| no complete version, or an older one | a durable state, first start, asked for another checkpoint file, which is newer | go on from the file |
| no complete version, or an older one | a durable state, which may be used, and no newer checkpoint file of the run | go on from the durable state |
| no complete version | nothing of this run was ever committed | begin anew |
| no complete version | a checkpoint file is there and may be used | go on from the file |
| no complete version | | refuse |

A run that has committed something is never begun anew in silence.
"""  # noqa: E501 - a row of a table is a line

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.errors import CkptlessError, OptionsError, StateMissingError
from lightning_ckptless.options import OnUnrecoverable
from lightning_ckptless.protocol.durable_schedule import DurableState
from lightning_ckptless.protocol.versions import Complete, Missing


class StartAction(StrEnum):
    """What a generation does when it starts."""

    FRESH = "fresh"
    RESTORE = "restore"
    DURABLE = "durable"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A checkpoint file.

    Args:
        path: of the file.
        step: the optimizer step it holds; None where that is not known.
    """

    path: str
    step: int | None = None

    def __str__(self) -> str:
        return self.path if self.step is None else f"{self.path} (step {self.step})"


@dataclass(frozen=True, slots=True)
class StartPlan:
    """What a generation does, and why.

    Args:
        action: what to do.
        reason: why, in a sentence; the message of the error where there is one.
        ckpt_path: checkpoint file to load: the user's with `FRESH`, the newest one, of the run or the user's, with
            `DURABLE`; None for none.
        state: durable state to go on from with `DURABLE`; None for the checkpoint file.
        error: the exception to raise; None unless the action is `REFUSE`.
    """

    action: StartAction
    reason: str
    ckpt_path: str | None = None
    state: DurableState | None = None
    error: type[CkptlessError] | None = None

    @property
    def enters_midway(self) -> bool:
        """Whether the loops are entered at the position of a version, and nothing is loaded by Lightning."""
        return self.action is StartAction.RESTORE or self.state is not None


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of a run outside of its arenas.

    Args:
        state: newest durable state; None where there is none.
        file: newest checkpoint file of the run; None where there is none.
        damaged: durable states that were left aside, in words.
    """

    state: DurableState | None = None
    file: CheckpointFile | None = None
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Start:
    """Which start of which run it is.

    Args:
        generation: number of this membership.
        world_size: number of ranks now.
        relaunched: whether this generation follows another one of the same start.
        had_commit: whether any version of this run was ever committed; True where nobody can tell.
        asked: checkpoint file that the user asked for at this start.
        origin: checkpoint file that the run in the arenas began from.
        on_unrecoverable: what to do without a complete version.
    """

    generation: int
    world_size: int
    relaunched: bool
    had_commit: bool
    asked: CheckpointFile | None
    origin: str | None
    on_unrecoverable: OnUnrecoverable

    @property
    def ckpt_path(self) -> str | None:
        """Path of the checkpoint file that the user asked for."""
        return None if self.asked is None else self.asked.path


def plan_start(start: Start, found: Complete | Missing, left: Left) -> StartPlan:
    """Decide what a generation does.

    Args:
        start: which start of which run it is.
        found: what the arenas hold.
        left: what there is beside them.
    """
    state = left.state
    if isinstance(found, Complete) and (start.relaunched or state is None or not _is_newer(state, found)):
        return _plan_from_arenas(start, found)
    if state is not None and (plan := _plan_from_state(start, found, state, left)) is not None:
        return plan
    assert isinstance(found, Missing), "a state that is newer than the arenas is used or refused"
    if not start.had_commit and not left.damaged:
        return StartPlan(StartAction.FRESH, _nothing_to_lose(start, found), start.ckpt_path)
    lost = _lost(start, found, left.damaged)
    if start.on_unrecoverable == "durable" and left.file is not None:
        reason = f"{lost}; it goes on from the newest checkpoint file, {left.file.path}"
        return StartPlan(StartAction.DURABLE, reason, left.file.path)
    return _refuse(StateMissingError, f"{lost}; {_no_rung_left(start.on_unrecoverable, left)}")


def _is_newer(state: DurableState, found: Complete) -> bool:
    return state.snapshot.version > found.snapshot.version


def _plan_from_arenas(start: Start, found: Complete) -> StartPlan:
    if not start.relaunched and start.ckpt_path is not None and start.ckpt_path != start.origin:
        return _refuse(OptionsError, _other_origin(found, start.ckpt_path, start.origin))
    more = _world_of(found.snapshot.world_size, start.world_size)
    return StartPlan(StartAction.RESTORE, f"generation {start.generation} goes on: {found.reason}{more}")


def _plan_from_state(start: Start, found: Complete | Missing, state: DurableState, left: Left) -> StartPlan | None:
    """What a durable state means for a start; None where something else is to be gone on from."""
    is_lost = isinstance(found, Missing) and start.had_commit
    if is_lost and start.on_unrecoverable == "raise":
        return None
    version, step = state.snapshot.version, state.snapshot.version.optimizer_step
    if is_lost and left.file is not None and left.file.step is not None and left.file.step > step:
        return None
    asked = None if start.relaunched or start.ckpt_path == state.origin else start.asked
    if asked is not None and asked.step is None:
        return _refuse(OptionsError, _asked_for_unknown(state, asked))
    if asked is not None and asked.step is not None and asked.step > step:
        reason = f"{state} of {version} is older than {asked}: generation {start.generation} goes on from that file"
        return StartPlan(StartAction.DURABLE, reason, asked.path)
    why = _why_state(start, found, state, asked, left) + _world_of(state.snapshot.world_size, start.world_size)
    return StartPlan(StartAction.DURABLE, f"generation {start.generation} goes on from {state}: {why}", state=state)


def _why_state(
    start: Start, found: Complete | Missing, state: DurableState, asked: CheckpointFile | None, left: Left
) -> str:
    version = state.snapshot.version
    other = f", newer than {found.snapshot.version} in the arenas" if isinstance(found, Complete) else ""
    missing = "" if isinstance(found, Complete) else f"; {found.reason}"
    file = f", not older than {asked}" if asked is not None else ""
    file += f", not older than {left.file}" if left.file is not None and start.had_commit else ""
    damaged = "".join(f"; left aside: {text}" for text in left.damaged)
    return f"{version} of run {state.run_id} is the newest that is left{other}{file}{missing}{damaged}"


def _refuse(error: type[CkptlessError], reason: str) -> StartPlan:
    return StartPlan(StartAction.REFUSE, reason, error=error)


def _world_of(before: int, world_size: int) -> str:
    return f"; written by {before} ranks, {world_size} go on" if before != world_size else ""


def _other_origin(found: Complete, ckpt_path: str, origin: str | None) -> str:
    return (
        f"ckpt_path={ckpt_path!r}, but the arenas hold {found.snapshot.version} of a run that {_began(origin)}: "
        f"{_same(origin)} to go on with that run, or remove it with `ckptless clean`"
    )


def _asked_for_unknown(state: DurableState, asked: CheckpointFile) -> str:
    return (
        f"ckpt_path={asked.path!r}, but {state} holds {state.snapshot.version} of a run that {_began(state.origin)}, "
        f"and the step of that file is not known: {_same(state.origin)} to go on from the state, or name another "
        "durable_dir"
    )


def _began(origin: str | None) -> str:
    return "began without a checkpoint file" if origin is None else f"began from {origin}"


def _same(origin: str | None) -> str:
    return "leave ckpt_path out" if origin is None else f"pass ckpt_path={origin!r}"


def _nothing_to_lose(start: Start, found: Missing) -> str:
    generation, begin = start.generation, "from the start" if start.asked is None else f"from {start.ckpt_path}"
    if start.relaunched:
        return (
            f"generation {generation} begins {begin}: no generation before it has committed a version ({found.reason})"
        )
    return f"{found.reason}: a new run, generation {generation} begins {begin}"


def _lost(start: Start, found: Missing, damaged: tuple[str, ...]) -> str:
    aside = "".join(f"; left aside: {text}" for text in damaged)
    return (
        f"generation {start.generation} finds no state to go on from, though the run has committed some: "
        f"{found.reason}{aside}"
    )


def _no_rung_left(on_unrecoverable: str, left: Left) -> str:
    if left.file is not None:
        fix = f"ckpt_path={left.file.path!r} and another run id begin from the newest file"
        return f"on_unrecoverable={on_unrecoverable!r} forbids to go on from a checkpoint file: {fix}"
    if left.state is not None:
        return (
            f"on_unrecoverable={on_unrecoverable!r} forbids to go on from {left.state}: on_unrecoverable='durable' "
            "allows it"
        )
    return "no checkpoint file of the run was found: begin again with `ckptless clean` or another run id"
