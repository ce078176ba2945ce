"""What the unrequested exit of a worker means: a fault of the node, or an error of the script itself.

A script that exits by itself would do so again after a restart, unless a lost peer caused the error. Inside `fit` the
first such error is retried once; the worker decides that.

A crash is a death by a signal that a process raises itself, e.g. SIGABRT or SIGSEGV, or by SIGKILL while the kernel was
out of memory. Faulty hardware may cause one, so the run recovers, but only a few times at the same place. Any other
SIGKILL comes from outside and counts only against the limits in `retry_policy.py`.

| The worker ended | And | Then |
|---|---|---|
| by a crash at a step | the fourth time in a row there | end, and keep the state |
| by a crash outside the training loop | the third time in a row there, without a new step | end, and keep the state |
| by a signal, or by an error that a lost peer caused | | recover |
| by itself, after `fit` | | end |
| by itself, after a new step since it was started | | recover |
| by itself, before `fit`, which an earlier process reached | the second time in a row | end, and keep the state |
| by itself, before a step | the third time in a row | end |
| by itself | | recover |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from lightning_ckptless.protocol.wording import name_ranks

_MOST_STARTS = 3
_MOST_STARTS_BEFORE_FIT = 2
_MOST_CRASHES_AT_A_STEP = 4
"""Number of crashes after which two recoveries in place and a relaunch have failed."""
_MOST_CRASHES_AT_A_STAGE = 3
_CRASHES = frozenset({"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP"})
"""Signals that a process raises itself, by `abort` or by a faulting instruction."""


class Stage(StrEnum):
    """Where a worker is in its script."""

    BEFORE = "before fit"
    INSIDE = "in fit, outside its training loop"
    PAST = "after fit"


@dataclass(frozen=True, slots=True)
class ProgramEnd:
    """How a worker ended.

    Args:
        exit_code: negative signal number for a death by signal; None if unknown.
        stage: where it was in its script.
        error: the exception that the script raised, on one line; empty if unknown.
        is_of_lost_peer: whether that error was caused by the loss of another rank.
        signal_name: the signal that killed it; empty if none did or if unknown.
        rank: rank of the worker.
        step: optimizer step in progress; None if there was none.
        out_of_memory: how many processes the kernel has killed for lack of memory since the last fault, as text; empty
            if none.
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
        """Whether the script exited by itself."""
        has_exited = self.exit_code is not None and self.exit_code >= 0
        return (has_exited or bool(self.error)) and not self.is_of_lost_peer

    @property
    def is_crash(self) -> bool:
        """Whether the process died by a signal it raised itself, or for lack of memory."""
        is_starved = self.signal_name == "SIGKILL" and bool(self.out_of_memory)
        return not self.error and (self.signal_name in _CRASHES or is_starved)

    @property
    def place(self) -> str:
        """Where it ended, as text."""
        return str(self.stage) if self.step is None else f"at step {self.step}"

    def __str__(self) -> str:
        return self.error or f"exit code {self.exit_code}"


@dataclass(frozen=True, slots=True)
class Starts:
    """The outcome of the starts of a script so far.

    Args:
        failed: how many starts in a row ended by themselves before a step.
        came_to_fit: whether any process has reached `fit`.
        crashes: consecutive crashes at the place of the last one.
    """

    failed: int = 0
    came_to_fit: bool = False
    crashes: tuple[ProgramEnd, ...] = ()


@dataclass(frozen=True, slots=True)
class EndPlan:
    """What the end of a worker means for the run.

    Args:
        starts: the outcome of the starts so far, this end included.
        final: why the run ends; None if it recovers.
        keeps_state: whether to keep the state, so that a user can fix the cause and restart the run.
    """

    starts: Starts
    final: str | None = None
    keeps_state: bool = False


def judge_end(end: ProgramEnd, starts: Starts, *, has_stepped: bool) -> EndPlan:
    """Decide what the end of a worker means for the run.

    Args:
        end: the end of the worker that ended first.
        starts: the outcome of earlier starts.
        has_stepped: whether a new step was committed since the workers were started.
    """
    if end.is_crash:
        return _judge_crash(end, replace(starts, failed=0), has_stepped=has_stepped)
    if not end.is_its_own:
        return EndPlan(replace(starts, failed=0))
    if end.stage is Stage.PAST:
        return EndPlan(
            starts,
            f"the script exited after fit ({end}) and would do so again: code after fit is not retried",
        )
    if has_stepped:
        return EndPlan(replace(starts, failed=0))
    failed = replace(starts, failed=starts.failed + 1)
    if end.stage is Stage.BEFORE and starts.came_to_fit and failed.failed >= _MOST_STARTS_BEFORE_FIT:
        return EndPlan(failed, _cannot_restart(end, failed.failed), keeps_state=True)
    if failed.failed >= _MOST_STARTS:
        return EndPlan(failed, f"{failed.failed} starts in a row exited before completing a step, the last with {end}")
    return EndPlan(failed)


def _judge_crash(end: ProgramEnd, starts: Starts, *, has_stepped: bool) -> EndPlan:
    # A run that commits the step at which it crashed never returns to it, but it may commit earlier steps again. So new
    # steps reset the count only for crashes outside the training loop.
    has_left = has_stepped and end.step is None
    crashes = (*(earlier for earlier in starts.crashes if earlier.place == end.place and not has_left), end)
    starts = replace(starts, crashes=crashes)
    if len(crashes) < (_MOST_CRASHES_AT_A_STAGE if end.step is None else _MOST_CRASHES_AT_A_STEP):
        return EndPlan(starts)
    return EndPlan(starts, _crashes_repeat(crashes), keeps_state=True)


def _crashes_repeat(crashes: tuple[ProgramEnd, ...]) -> str:
    last, ranks = crashes[-1], sorted({crash.rank for crash in crashes})
    crashed = name_ranks(ranks)
    signals = sorted({crash.signal_name for crash in crashes})
    starved = next((crash.out_of_memory for crash in reversed(crashes) if crash.out_of_memory), "")
    advice = (
        f"{starved}: raise the memory limit or use less memory, e.g. smaller batches or fewer dataloader workers"
        if starved
        else "set PYTHONFAULTHANDLER=1 to print where it crashes"
    )
    return (
        f"{crashed} crashed {len(crashes)} times in a row {last.place} ({', '.join(signals)}) and would do so again. "
        f"{advice[0].upper()}{advice[1:]}"
    )


def _cannot_restart(end: ProgramEnd, count: int) -> str:
    return (
        f"{count} new processes in a row exited before fit ({end}), which the first processes reached: the code before "
        "fit cannot be run again. Make it repeatable, e.g. let it accept an output folder that already exists"
    )
