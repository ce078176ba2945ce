"""What the unrequested end of a worker means: a fault of the machine, or the program's own end.

A program that ends by itself would end alike if it were started again, unless a lost peer made it. Only inside `fit`
is its first error tried once more, which the worker decides itself.

A crash is a death by a signal that a process causes itself, e.g. SIGABRT or SIGSEGV, or by SIGKILL while the kernel was
out of memory. A machine may cause one, so it is recovered from, but not again and again at the same place. Any other
SIGKILL comes from outside, and only the limits of `recovery_limits.py` count it.

| The worker ended | And | Then |
|---|---|---|
| by a crash at a step | the fourth time in a row there | end, and keep the state |
| by a crash outside the training loop | the third time in a row there, without a new step | end, and keep the state |
| by a signal, or by the error of a lost peer | | recover |
| by itself, past a `fit` | | end |
| by itself, after a new step of this start | | recover |
| by itself, before `fit`, to which an earlier process came | the second time in a row | end, and keep the state |
| by itself, before a step | the third time in a row | end |
| by itself | | recover |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

_MOST_STARTS = 3
_MOST_STARTS_BEFORE_FIT = 2
_MOST_CRASHES_AT_A_STEP = 4
"""Two recoveries in place and a relaunch have failed by then."""
_MOST_CRASHES_AT_A_STAGE = 3
_CRASHES = frozenset({"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP"})
"""Signals that a process causes itself, by `abort` or by an instruction that fails."""


class Stage(StrEnum):
    """Where a worker is in its program."""

    BEFORE = "before fit"
    INSIDE = "in fit, outside its training loop"
    PAST = "past fit"


@dataclass(frozen=True, slots=True)
class ProgramEnd:
    """How a worker ended.

    Args:
        exit_code: minus the signal's number for a death by signal; None where it is not known.
        stage: where it was in its program.
        error: what the program raised, in a line; empty where that is not known.
        is_of_lost_peer: whether that error says that another rank is gone.
        signal_name: the signal that ended it; empty where none did, or that is not known.
        rank: of the worker.
        step: optimizer step that it had begun; None where it was in none.
        out_of_memory: how many processes the kernel has killed for lack of memory, in words; empty where it has killed
            none since the last fault.
    """

    exit_code: int | None
    stage: Stage
    error: str = ""
    is_of_lost_peer: bool = False
    signal_name: str = ""
    rank: int = 0
    step: int | None = None
    out_of_memory: str = ""

    @property
    def is_its_own(self) -> bool:
        """Whether the program ended by itself."""
        has_exited = self.exit_code is not None and self.exit_code >= 0
        return (has_exited or bool(self.error)) and not self.is_of_lost_peer

    @property
    def is_crash(self) -> bool:
        """Whether the process died by what it did itself, or for lack of memory."""
        is_starved = self.signal_name == "SIGKILL" and bool(self.out_of_memory)
        return not self.error and (self.signal_name in _CRASHES or is_starved)

    @property
    def place(self) -> str:
        """Where it ended, in words."""
        return str(self.stage) if self.step is None else f"at step {self.step}"

    def __str__(self) -> str:
        return self.error or f"exit code {self.exit_code}"


@dataclass(frozen=True, slots=True)
class Starts:
    """What the starts of a program have come to.

    Args:
        failed: how many in a row have ended by themselves before a step.
        came_to_fit: whether a process has come to `fit`.
        crashes: those in a row at the place of the last one.
    """

    failed: int = 0
    came_to_fit: bool = False
    crashes: tuple[ProgramEnd, ...] = ()


@dataclass(frozen=True, slots=True)
class EndPlan:
    """What the end of a worker means.

    Args:
        starts: with this end counted.
        final: why the run ends with it; None where it recovers.
        keeps_state: whether its state is worth a start by hand, after what is in the way has been removed.
    """

    starts: Starts
    final: str | None = None
    keeps_state: bool = False


def judge_end(end: ProgramEnd, starts: Starts, *, has_stepped: bool) -> EndPlan:
    """Decide what the end of a worker means.

    Args:
        end: of the worker that ended first.
        starts: what earlier starts have come to.
        has_stepped: whether a new step was committed since the workers were started.
    """
    if end.is_crash:
        return _judge_crash(end, replace(starts, failed=0), has_stepped=has_stepped)
    if not end.is_its_own:
        return EndPlan(replace(starts, failed=0))
    if end.stage is Stage.PAST:
        return EndPlan(
            starts,
            f"the program itself ended past fit ({end}), and would do so again: what stands there is not repeated",
        )
    if has_stepped:
        return EndPlan(replace(starts, failed=0))
    failed = replace(starts, failed=starts.failed + 1)
    if end.stage is Stage.BEFORE and starts.came_to_fit and failed.failed >= _MOST_STARTS_BEFORE_FIT:
        return EndPlan(failed, _head_does_not_repeat(end, failed.failed), keeps_state=True)
    if failed.failed >= _MOST_STARTS:
        return EndPlan(failed, f"{failed.failed} starts in a row ended before a step was made, the last with {end}")
    return EndPlan(failed)


def _judge_crash(end: ProgramEnd, starts: Starts, *, has_stepped: bool) -> EndPlan:
    # A run that has committed a step that crashed does not come back to it, but it may commit those before it again.
    has_left = has_stepped and end.step is None
    crashes = (*(earlier for earlier in starts.crashes if earlier.place == end.place and not has_left), end)
    starts = replace(starts, crashes=crashes)
    if len(crashes) < (_MOST_CRASHES_AT_A_STAGE if end.step is None else _MOST_CRASHES_AT_A_STEP):
        return EndPlan(starts)
    return EndPlan(starts, _crashes_repeat(crashes), keeps_state=True)


def _crashes_repeat(crashes: tuple[ProgramEnd, ...]) -> str:
    last, ranks = crashes[-1], sorted({crash.rank for crash in crashes})
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    signals = sorted({crash.signal_name for crash in crashes})
    starved = next((crash.out_of_memory for crash in reversed(crashes) if crash.out_of_memory), "")
    advice = (
        f"{starved}: allow more memory, or use less of it, e.g. by smaller batches or fewer dataloader workers"
        if starved
        else "PYTHONFAULTHANDLER=1 in the environment prints where it crashes"
    )
    return (
        f"{who} crashed {len(crashes)} times in a row {last.place} ({', '.join(signals)}), and would do so again. "
        f"{advice[0].upper()}{advice[1:]}"
    )


def _head_does_not_repeat(end: ProgramEnd, count: int) -> str:
    return (
        f"{count} new processes in a row ended before fit ({end}), to which the first ones came: what the program does "
        "before fit cannot be repeated. Remove what stands in its way, e.g. make it accept an output folder that is "
        "there already"
    )
