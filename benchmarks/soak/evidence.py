"""Evaluate a run of the soak test: recoveries, their times and versions, and lost committed steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.soak.watching import Commit
from lightning_ckptless.ledger import Event

IN_PLACE, RELAUNCH, DURABLE, STORAGE = "in place", "relaunch", "durable", "storage"
RUNGS = (IN_PLACE, RELAUNCH, DURABLE, STORAGE)


@dataclass(frozen=True)
class Recovered:
    """One recovery.

    Args:
        kind: how the failed rank exited.
        rung: kind of recovery.
        reason: reason for the kind of recovery, as reported by the agent.
        version: version from which training resumed.
        total_s: seconds from the fault to the end of the first step.
        phases: seconds by phase.
        cause: its faults, in words.
    """

    kind: str
    rung: str
    reason: str
    version: str
    total_s: float
    phases: dict[str, float] = field(default_factory=dict)
    cause: str = ""


def recoveries_of(events: Iterable[Event]) -> list[Recovered]:
    """Return the recoveries in a ledger, each with the reason for its kind."""
    found: list[Recovered] = []
    reason, started = "", ""
    for event in events:
        fields = event.fields
        if event.event in ("in_place", "relaunch", "move"):
            reason = fields["reason"]
        elif event.event == "run_started":
            started = fields["reason"]
        elif event.event == "recovery":
            rung = fields["rung"]
            if rung == RELAUNCH and "durable state" in started:
                rung = DURABLE
            elif rung == RELAUNCH and "checkpoint file" in started:
                rung = STORAGE
            times = fields["total_s"], fields["phases"]
            found.append(Recovered(fields["kind"], rung, reason, fields["version"], *times, fields["cause"]))
            reason = started = ""
    return found


def lost_steps(commits: Sequence[Commit], events: Iterable[Event]) -> int:
    """Return the number of committed optimizer steps that recoveries from replicas lost.

    If no replica exists any more, a durable state is restored, which is older by design.

    Args:
        commits: committed versions, by time.
        events: events of the ledger.
    """
    lost, started = 0, ""
    for event in events:
        if event.event == "run_started":
            started = event.fields["reason"]
        if event.event != "restored" or "durable state" in started:
            continue
        step = _step(event.fields["version"])
        before = [commit for commit in commits if commit.at < event.at]
        # A rank may record a commit while another already restores it: only newer versions than that count.
        newest = before[-1].version.optimizer_step if before else 0
        lost += max(0, newest - step)
    return lost


def _step(version: str) -> int:
    """Parse the optimizer step of a version such as `step 7 (before validation)`."""
    return int(version.split()[1])


@dataclass(frozen=True)
class Evidence:
    """What is known of a run that is over.

    Args:
        exit_code: exit code of its agent; None if it missed its deadline.
        identical: whether it equals the undisturbed run.
        events: events of the ledger.
        struck: injected faults.
        lost: number of lost committed steps.
        difference: how it differs from the undisturbed run, in words.
        why: what else is known of its end.
        left_out: faults that this machine does not allow.
        leaks: what was left behind.
    """

    exit_code: int | None
    identical: bool
    events: Sequence[Event] = ()
    struck: tuple[str, ...] = ()
    lost: int = 0
    difference: str = ""
    why: str = ""
    left_out: tuple[str, ...] = ()
    leaks: tuple[str, ...] = ()


def outcome_of(
    *, exit_code: int | None, identical: bool, lost: int, leaks: Sequence[str], late: Sequence[str]
) -> tuple[str, str]:
    """Return the outcome of a run, and the reason in a sentence.

    Args:
        exit_code: exit code of its agent; None if it missed its deadline.
        identical: whether it equals the undisturbed run.
        lost: number of lost committed steps.
        leaks: what was left behind.
        late: recoveries that exceeded their bound.
    """
    if exit_code is None:
        return "hang", "the run missed its deadline"
    if exit_code:
        return "ended", f"the run ended with exit code {exit_code}"
    if not identical:
        return "different", "the run differs from the undisturbed one"
    if lost:
        return "lost", f"{lost} committed steps were lost"
    if leaks:
        return "leak", f"left behind: {'; '.join(leaks)}"
    if late:
        return "late", f"too long: {'; '.join(late)}"
    return "good", ""


def times_of(recoveries: Sequence[Recovered], bounds: dict[str, float], silent_s: float) -> list[str]:
    """Return the recoveries that exceeded their bound, in words.

    Args:
        recoveries: recoveries of a run.
        bounds: seconds by kind of recovery.
        silent_s: additional seconds if one of its faults is detected by silence.
    """
    found = []
    for one in recoveries:
        is_silent = one.kind in ("hung", "lost") or " hung: " in one.cause
        bound_s = bounds[one.rung] + (silent_s if is_silent else 0.0)
        if one.total_s > bound_s:
            found.append(f"{one.kind}, {one.rung}: {one.total_s:.1f} s, more than {bound_s:.0f} s")
    return found
