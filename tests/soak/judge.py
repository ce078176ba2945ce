"""Evaluate a run of the soak test: its recoveries, their time limits, lost steps, and the outcome."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_ckptless.ledger import Event
from lightning_ckptless.protocol.fault_script import Moment
from lightning_ckptless.protocol.hang_detection import IDLE_S, RELEASE_S
from tests.soak.outside import Commit
from tests.soak.scenario import SILENT, OutsideKind, Scenario

IN_PLACE, RELAUNCH, DURABLE, STORAGE = RUNGS = "in place", "relaunch", "durable", "storage"
BOUNDS_S = {IN_PLACE: 20.0, RELAUNCH: 60.0, DURABLE: 60.0, STORAGE: 60.0}
"""Seconds from the detection of a fault to the end of the first step of all ranks, by kind of recovery."""
NODE_LOST_S = 15.0
"""Seconds until the loss of a node is detected and the others have re-rendezvoused."""
LEARNED_HANG_S = 30.0
"""Longest silence before a hang is detected with a learned timeout: 10 s, or more if steps were slow."""
NOT_SILENT_S = 2.0
START_S = 90.0
NODES_S = 120.0
"""Additional seconds for a scenario with several agents: missed heartbeats and re-rendezvous."""
AT_THE_SAME_POINT = frozenset({Moment.VALIDATION, Moment.EPOCH_END})
"""Moments at which no other rank may be ahead of a hung one, which is then detected because it is idle."""


class Recovered(NamedTuple):
    """One recovery.

    Args:
        kind: how the failed rank exited.
        rung: kind of recovery.
        total_s: seconds from the fault to the end of the first step.
        cause: its faults, in words.
    """

    kind: str
    rung: str
    total_s: float
    cause: str = ""


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


@dataclass(frozen=True)
class Result:
    """The result of a run, as it is stored.

    Args:
        seed: seed of its scenario.
        load: whether all cores were kept busy.
        struck: injected faults.
        outcome: `good`, or the kind of failure.
        why: reason of the failure, in a sentence.
        lost_steps: number of lost committed steps.
        recoveries: recoveries, in order.
        leaks: what was left behind.
        left_out: faults that this machine does not allow.
    """

    seed: int
    load: bool
    struck: tuple[str, ...]
    outcome: str
    why: str = ""
    lost_steps: int = 0
    recoveries: tuple[Recovered, ...] = ()
    leaks: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        return self.outcome == "good"


def judge(scenario: Scenario, evidence: Evidence) -> Result:
    """Evaluate a run."""
    recoveries = recoveries_of(evidence.events)
    outcome, why = outcome_of(evidence, too_late(recoveries, bounds_s(scenario), silent_s(scenario)))
    return Result(
        scenario.seed, scenario.load, evidence.struck, outcome,
        why=evidence.difference if outcome == "different" else "; ".join(filter(None, (why, evidence.why))),
        lost_steps=evidence.lost, recoveries=tuple(recoveries), leaks=evidence.leaks, left_out=evidence.left_out,
    )  # fmt: skip


def outcome_of(evidence: Evidence, late: Sequence[str] = ()) -> tuple[str, str]:
    """Return the outcome of a run, and the reason in a sentence, given the recoveries that took too long."""
    failures = (
        (evidence.exit_code is None, "hang", "the run missed its deadline"),
        (evidence.exit_code, "ended", f"the run ended with exit code {evidence.exit_code}"),
        (not evidence.identical, "different", "the run differs from the undisturbed one"),
        (evidence.lost, "lost", f"{evidence.lost} committed steps were lost"),
        (evidence.leaks, "leak", f"left behind: {'; '.join(evidence.leaks)}"),
        (late, "late", f"too long: {'; '.join(late)}"),
    )
    return next(((outcome, why) for failed, outcome, why in failures if failed), ("good", ""))


# ---------------------------------------------------------------------- the ledger


def recoveries_of(events: Iterable[Event]) -> list[Recovered]:
    """Return the recoveries in a ledger; a relaunch that found no replica is `durable` or `storage`."""
    found: list[Recovered] = []
    started = ""
    for event in events:
        if event.event == "run_started":
            started = event.fields["reason"]
        elif event.event == "recovery":
            rung = event.fields["rung"]
            if rung == RELAUNCH:
                rung = DURABLE if "durable state" in started else STORAGE if "checkpoint file" in started else rung
            found.append(Recovered(event.fields["kind"], rung, event.fields["total_s"], event.fields["cause"]))
            started = ""
    return found


def lost_steps(commits: Sequence[Commit], events: Iterable[Event]) -> int:
    """Return the number of committed optimizer steps that recoveries from replicas lost.

    If no replica exists any more, a durable state is restored, which is older by design.
    """
    lost, started = 0, ""
    for event in events:
        if event.event == "run_started":
            started = event.fields["reason"]
        if event.event != "restored" or "durable state" in started:
            continue
        step = int(event.fields["version"].split()[1])  # such as `step 7 (before validation)`
        before = [commit for commit in commits if commit.at < event.at]
        # A rank may record a commit while another already restores it: only newer versions than that count.
        newest = before[-1].version.optimizer_step if before else 0
        lost += max(0, newest - step)
    return lost


# ---------------------------------------------------------------------- time limits


def too_late(recoveries: Sequence[Recovered], bounds: dict[str, float], silent_s: float) -> list[str]:
    """Return the recoveries that exceeded their bound, in words; those from silence are allowed `silent_s` more."""
    found = []
    for one in recoveries:
        is_silent = one.kind in ("hung", "lost") or " hung: " in one.cause
        bound_s = bounds[one.rung] + (silent_s if is_silent else 0.0)
        if one.total_s > bound_s:
            found.append(f"{one.kind}, {one.rung}: {one.total_s:.1f} s, more than {bound_s:.0f} s")
    return found


def bounds_s(scenario: Scenario) -> dict[str, float]:
    """Return the bounds of a scenario in seconds, by kind of recovery.

    A rank that is silent during another fault or its recovery is replaced if it has not released its process groups
    within `RELEASE_S`.
    """
    more_s = RELEASE_S if _silent_faults(scenario) else 0.0
    return {rung: bound_s + more_s for rung, bound_s in BOUNDS_S.items()}


def silent_s(scenario: Scenario) -> float:
    """Return the longest time in seconds until a silent fault of a scenario is detected."""
    if scenario.configuration.loss is not None:
        return NODE_LOST_S
    if (limit_s := scenario.configuration.hang_timeout_s) is not None:
        return limit_s + NOT_SILENT_S
    last = any(fault.kind in SILENT and fault.at in AT_THE_SAME_POINT for fault in scenario.injected)
    return LEARNED_HANG_S + (IDLE_S if last else 0.0)


def deadline_s(scenario: Scenario) -> float:
    """Return the longest time in seconds that a run may take; one that exceeds it hangs."""
    relaunched = sum(fault.kind is OutsideKind.FORK_SERVER for fault in scenario.outside)
    relaunched += sum(fault.rank == "all" for fault in scenario.injected)
    nodes_s = NODES_S if scenario.configuration.nodes > 1 else 0.0
    recovered_s = len(scenario.faults) * BOUNDS_S[IN_PLACE] / 2 + relaunched * BOUNDS_S[RELAUNCH]
    return START_S + nodes_s + recovered_s + _silent_faults(scenario) * silent_s(scenario)


def _silent_faults(scenario: Scenario) -> int:
    injected = sum(fault.kind in SILENT for fault in scenario.injected)
    return injected + sum(fault.kind is OutsideKind.STOP for fault in scenario.outside)
