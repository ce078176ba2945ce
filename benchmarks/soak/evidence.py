"""What a run of the soak has shown: which recoveries, how long, from where, and whether a committed step was lost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ckptless.ledger import Event
from lightning_ckptless.protocol.versions import Version

IN_PLACE, RELAUNCH, DURABLE, STORAGE = "in place", "relaunch", "durable", "storage"
RUNGS = (IN_PLACE, RELAUNCH, DURABLE, STORAGE)


@dataclass(frozen=True)
class Recovered:
    """One recovery.

    Args:
        kind: how the culprit ended.
        rung: of the ladder.
        reason: for the rung, in the agent's words.
        version: that training continued from.
        total_s: from the fault to the end of the first step.
        phases: seconds by phase.
    """

    kind: str
    rung: str
    reason: str
    version: str
    total_s: float
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Commit:
    """A version that a rank has seen committed, and when."""

    at: float
    version: Version


def recoveries_of(events: Iterable[Event]) -> list[Recovered]:
    """The recoveries in a ledger, each with the reason for its rung."""
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
            recovered = (fields["kind"], rung, reason, fields["version"], fields["total_s"], fields["phases"])
            found.append(Recovered(*recovered))
            reason = started = ""
    return found


def commits_of(path: Path) -> list[Commit]:
    """The committed versions that ranks have noted, in the order of time; torn lines are left out."""
    found = []
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found.append(Commit(row["at"], Version(row["step"], row["validation_done"])))
    return sorted(found, key=lambda commit: commit.at)


def lost_steps(commits: Sequence[Commit], events: Iterable[Event]) -> int:
    """Committed optimizer steps that recoveries from replicas went back behind.

    Where all replicas are gone a durable state is what is left; it is older by design.

    Args:
        commits: in the order of time.
        events: of the ledger.
    """
    lost, started = 0, ""
    for event in events:
        if event.event == "run_started":
            started = event.fields["reason"]
        if event.event != "restored" or "durable state" in started:
            continue
        step = _step(event.fields["version"])
        before = [commit for commit in commits if commit.at < event.at]
        # A rank may note a commit while another already restores it: only what is newer than the restored one counts.
        newest = before[-1].version.optimizer_step if before else 0
        lost += max(0, newest - step)
    return lost


def _step(version: str) -> int:
    """The optimizer step of a version in words: `step 7 (before validation)`."""
    return int(version.split()[1])


def outcome_of(
    *, exit_code: int | None, identical: bool, lost: int, leaks: Sequence[str], late: Sequence[str]
) -> tuple[str, str]:
    """How a run came out, and why, in a sentence.

    Args:
        exit_code: of its agent; None where it missed its deadline.
        identical: whether it is the same as the undisturbed one.
        lost: committed steps that were lost.
        leaks: what was left.
        late: recoveries that took longer than they may.
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
    """Recoveries that took longer than their bound, in words.

    Args:
        recoveries: of a run.
        bounds: seconds by rung.
        silent_s: how much longer a fault may take that is noticed by silence.
    """
    found = []
    for one in recoveries:
        bound_s = bounds[one.rung] + (silent_s if one.kind in ("hung", "lost") else 0.0)
        if one.total_s > bound_s:
            found.append(f"{one.kind}, {one.rung}: {one.total_s:.1f} s of {bound_s:.0f} s at most")
    return found


def as_json(recoveries: Sequence[Recovered]) -> list[dict[str, Any]]:
    """Recoveries as JSON holds them."""
    return [vars(one) for one in recoveries]
