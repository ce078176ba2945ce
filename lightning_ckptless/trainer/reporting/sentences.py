"""The sentences in which a run reports its start, its recoveries, its rewinds and its end.

Apart from `report`, because they are pure: what they say depends on their arguments alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.protocol.mtbf import Mtbf
from lightning_ckptless.protocol.phases import PHASE_FIELDS, Phases
from lightning_ckptless.protocol.replacement_startup import Arrival, why_slow
from lightning_ckptless.protocol.run_counts import RunCounts
from lightning_ckptless.protocol.time_account import TimeAccount
from lightning_ckptless.protocol.wording import counted


def start_line(reason: str, fit_index: int, *, had_ended: bool) -> str:
    """Return what a generation starts from as one line.

    Args:
        reason: why it starts from there.
        fit_index: number of earlier calls of `fit` in this process.
        had_ended: whether this `fit` had returned before the fault.
    """
    which = f"call {fit_index + 1} of fit" if fit_index or had_ended else ""
    ended = " had returned before the fault, none of its steps is replayed" if had_ended else ""
    return ": ".join(filter(None, [which + ended, reason]))


def cause_of(fault: FaultReport | None) -> str:
    """Return what a recovery recovers from: the faults, in the order of their occurrence."""
    if fault is None:
        return "the workers were relaunched"
    return "; then ".join([*(text for _, text in fault.earlier), str(fault)]) if fault.earlier else fault.cause


def recovery_line(
    fault: FaultReport | None, resumed: str, phases: Phases, arrivals: Sequence[Arrival], *, in_place: bool
) -> str:
    """Return a recovery as one line.

    Args:
        fault: the fault; None if no agent reported it.
        resumed: what training has resumed from.
        phases: where the time of the recovery went.
        arrivals: startup figures of the new processes.
        in_place: whether survivors stayed in their processes.
    """
    named = fault is not None and fault.rank is not None
    who = f"rank {fault.rank} {fault.cause}" if fault and named and not fault.earlier else cause_of(fault)
    seconds = {name: f"{getattr(phases, name):.2f}" for name in PHASE_FIELDS}
    if seconds["other_s"] == "0.00":
        del seconds["other_s"]
    parts = " + ".join(f"{name.removesuffix('_s')} {value}" for name, value in seconds.items())
    how = "in place" if in_place else "by relaunch"
    slow = why_slow(phases.regroup_s, arrivals)
    return f"recovered {how} ({who}): {resumed}, {phases.total_s:.2f} s = {parts}{f'; {slow}' if slow else ''}"


def rewind_line(reason: str, skipped_batches: int, took_s: float) -> str:
    """Return a rewind as one line."""
    skipped = (
        f"; skipping the next {counted(skipped_batches, 'batch', 'batches')} of each rank" if skipped_batches else ""
    )
    return f"rewound {reason}{skipped}; it took {took_s:.2f} s"


def end_lines(account: TimeAccount, counts: RunCounts, mtbf: Mtbf) -> list[str]:
    """Return the end of a run in one line, or in two if it has recovered from faults.

    Args:
        account: where its time went.
        counts: what it has counted.
        mtbf: its mean time between failures.
    """
    recoveries = counted(counts.recoveries, "recovery", "recoveries")
    spent = sorted(account.seconds.items(), key=lambda pair: -pair[1])
    named = ", ".join(f"{bucket} {spent_s:.1f} s" for bucket, spent_s in spent if spent_s >= 0.05)
    ended = f"fit ended: goodput {account.goodput:.1%} of {account.wall_s:.1f} s, {recoveries}; {named}"
    return [ended, f"{counted(counts.steps_replayed, 'step')} replayed; {mtbf}"] if counts.recoveries else [ended]
