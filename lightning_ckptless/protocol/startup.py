"""How a generation starts: restore a version, load a durable state or a checkpoint file, or refuse.

The first row that applies decides. The newest state of the run is used, by optimizer step; of equally new ones, one
that contains the exact position in the data is preferred.

| Arenas | And | Then |
|---|---|---|
| a complete version, as new as any durable state | first start, and the user passed a checkpoint file other than the one the run started from | refuse |
| a complete version, as new as any durable state | | restore it |
| no complete version, or an older one | a durable state; first start, and the user passed another checkpoint file whose step is unknown | refuse |
| no complete version, or an older one | a durable state; first start, and the user passed another checkpoint file that is newer | resume from the file |
| no complete version, or an older one | a durable state that may be used, and no newer checkpoint file of the run | resume from the durable state |
| no complete version | the run never committed a version | start from scratch |
| no complete version | a checkpoint file exists and may be used | resume from the file |
| no complete version | | refuse |

A run that has committed a version never starts from scratch silently.
"""  # noqa: E501 - a row of a table is a line

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.errors import CkptlessError, OptionsError, StateMissingError
from lightning_ckptless.options import OnUnrecoverable
from lightning_ckptless.protocol.durable_schedule import DurableState
from lightning_ckptless.protocol.versions import Complete, Missing


class StartAction(StrEnum):
    """How a generation starts."""

    FRESH = "fresh"
    RESTORE = "restore"
    DURABLE = "durable"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A checkpoint file.

    Args:
        path: path of the file.
        step: optimizer step of its state; None if unknown.
    """

    path: str
    step: int | None = None

    def __str__(self) -> str:
        return self.path if self.step is None else f"{self.path} (step {self.step})"


@dataclass(frozen=True, slots=True)
class StartPlan:
    """How a generation starts and the reason for it.

    Args:
        action: what to do.
        reason: explanation, one sentence; the message of the error if there is one.
        ckpt_path: checkpoint file to load: the user's with `FRESH`; the newest one, of the run or the user's, with
            `DURABLE`; None for none.
        state: durable state to resume from with `DURABLE`; None for the checkpoint file.
        error: exception to raise; None unless the action is `REFUSE`.
    """

    action: StartAction
    reason: str
    ckpt_path: str | None = None
    state: DurableState | None = None
    error: type[CkptlessError] | None = None

    @property
    def enters_midway(self) -> bool:
        """Whether the loops start at the position of a version, without Lightning loading a checkpoint."""
        return self.action is StartAction.RESTORE or self.state is not None


@dataclass(frozen=True, slots=True)
class Left:
    """What remains of a run outside its arenas.

    Args:
        state: newest durable state; None if there is none.
        file: newest checkpoint file of the run; None if there is none.
        damaged: descriptions of the durable states that cannot be used.
    """

    state: DurableState | None = None
    file: CheckpointFile | None = None
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Start:
    """The circumstances of a start.

    Args:
        generation: number of the generation.
        world_size: current number of ranks.
        relaunched: whether this generation follows another one of the same start.
        had_commit: whether the run ever committed a version; True if unknown.
        asked: checkpoint file that the user passed at this start.
        origin: checkpoint file that the run in the arenas started from.
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
        """Path of the checkpoint file that the user passed."""
        return None if self.asked is None else self.asked.path


def plan_start(start: Start, found: Complete | Missing, left: Left) -> StartPlan:
    """Decide how a generation starts.

    Args:
        start: circumstances of the start.
        found: what the arenas contain.
        left: what remains outside the arenas.
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
        reason = f"{lost}; it resumes from the newest checkpoint file, {left.file.path}"
        return StartPlan(StartAction.DURABLE, reason, left.file.path)
    return _refuse(StateMissingError, f"{lost}; {_no_rung_left(start.on_unrecoverable, left)}")


def _is_newer(state: DurableState, found: Complete) -> bool:
    return state.snapshot.version > found.snapshot.version


def _plan_from_arenas(start: Start, found: Complete) -> StartPlan:
    if not start.relaunched and start.ckpt_path is not None and start.ckpt_path != start.origin:
        return _refuse(OptionsError, _other_origin(found, start.ckpt_path, start.origin))
    more = _world_of(found.snapshot.world_size, start.world_size)
    return StartPlan(StartAction.RESTORE, f"generation {start.generation} resumes: {found.reason}{more}")


def _plan_from_state(start: Start, found: Complete | Missing, state: DurableState, left: Left) -> StartPlan | None:
    """The plan for a durable state; None to resume from something else."""
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
        reason = f"{state} of {version} is older than {asked}: generation {start.generation} resumes from that file"
        return StartPlan(StartAction.DURABLE, reason, asked.path)
    why = _why_state(start, found, state, asked, left) + _world_of(state.snapshot.world_size, start.world_size)
    return StartPlan(StartAction.DURABLE, f"generation {start.generation} resumes from {state}: {why}", state=state)


def _why_state(
    start: Start, found: Complete | Missing, state: DurableState, asked: CheckpointFile | None, left: Left
) -> str:
    version = state.snapshot.version
    other = f", newer than {found.snapshot.version} in the arenas" if isinstance(found, Complete) else ""
    missing = "" if isinstance(found, Complete) else f"; {found.reason}"
    file = f", not older than {asked}" if asked is not None else ""
    file += f", not older than {left.file}" if left.file is not None and start.had_commit else ""
    damaged = "".join(f"; ignored: {text}" for text in left.damaged)
    return f"{version} of run {state.run_id} is the newest state left{other}{file}{missing}{damaged}"


def _refuse(error: type[CkptlessError], reason: str) -> StartPlan:
    return StartPlan(StartAction.REFUSE, reason, error=error)


def _world_of(before: int, world_size: int) -> str:
    return f"; written by {before} ranks, resumed on {world_size}" if before != world_size else ""


def _other_origin(found: Complete, ckpt_path: str, origin: str | None) -> str:
    return (
        f"ckpt_path={ckpt_path!r}, but the arenas hold {found.snapshot.version} of a run that {_began(origin)}: "
        f"{_same(origin)} to continue that run, or remove it with `ckptless clean`"
    )


def _asked_for_unknown(state: DurableState, asked: CheckpointFile) -> str:
    return (
        f"ckpt_path={asked.path!r}, but {state} holds {state.snapshot.version} of a run that {_began(state.origin)}, "
        f"and the step of the file is unknown: {_same(state.origin)} to resume from the durable state, or set another "
        "durable_dir"
    )


def _began(origin: str | None) -> str:
    return "started without a checkpoint file" if origin is None else f"started from {origin}"


def _same(origin: str | None) -> str:
    return "omit ckpt_path" if origin is None else f"pass ckpt_path={origin!r}"


def _nothing_to_lose(start: Start, found: Missing) -> str:
    generation, begin = start.generation, "from scratch" if start.asked is None else f"from {start.ckpt_path}"
    if start.relaunched:
        return f"generation {generation} starts {begin}: no earlier generation committed a version ({found.reason})"
    return f"{found.reason}: a new run, generation {generation} starts {begin}"


def _lost(start: Start, found: Missing, damaged: tuple[str, ...]) -> str:
    ignored = "".join(f"; ignored: {text}" for text in damaged)
    return (
        f"generation {start.generation} finds no state to resume from, although the run has committed versions: "
        f"{found.reason}{ignored}"
    )


def _no_rung_left(on_unrecoverable: str, left: Left) -> str:
    if left.file is not None:
        fix = f"pass ckpt_path={left.file.path!r} and another run id to start from the newest file"
        return f"on_unrecoverable={on_unrecoverable!r} forbids resuming from a checkpoint file: {fix}"
    if left.state is not None:
        return (
            f"on_unrecoverable={on_unrecoverable!r} forbids resuming from {left.state}: set "
            "on_unrecoverable='durable' to allow it"
        )
    return "no checkpoint file of the run was found: start over with `ckptless clean` or another run id"
