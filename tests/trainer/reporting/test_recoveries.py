"""Which faults a reported recovery includes, and how recoveries are counted over processes and versions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lightning_ckptless import environment
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.worker.watcher import Assignment
from lightning_ckptless.protocol.run_counts import RunCounts
from lightning_ckptless.protocol.versions import Complete, Version
from lightning_ckptless.trainer.reporting.report import Moved, RunReport
from lightning_ckptless.trainer.session.identity import Identity

Saved = dict[str, Any]
FIRST, SECOND = "rank 1 (pid 7) died by SIGKILL", "rank 0 (pid 7) died by SIGKILL"


class FirstRank:
    """A process of rank 0 of two, at a time that the test sets.

    Args:
        fault: fault after which it was started.
    """

    def __init__(self, fault: FaultReport | None = None) -> None:
        self.now = 0.0
        self.recoveries: list[tuple[str, float]] = []
        env = {environment.AGENT_STARTED_AT: "0.0"} | ({environment.FAULT_REPORT: fault.to_json()} if fault else {})
        self.report = RunReport(
            SimpleNamespace(global_rank=0, world_size=2, global_step=0, loggers=(), train_dataloader=None),
            cast("Any", SimpleNamespace(record=self._record, generation=1, path=Path("/nonexistent"))),
            Identity("run", "node", 1, True, Path("/nonexistent")),
            clock=lambda: self.now,
            env=env,
            say=lambda *_: None,
        )

    def _record(self, event: str, **fields: Any) -> None:
        if event == "recovery":
            self.recoveries.append((fields["cause"], fields["total_s"]))

    def step(self, step: int, at: float, *, learns: bool = True) -> Saved:
        """Make a step, and return the accounts of its version.

        Args:
            step: number of the step.
            at: when it is done.
            learns: whether this rank learns that the version is committed.
        """
        self.now = at
        self.report.begin_training()
        version = Version(step, True)
        saved = self.report.state(version)
        if learns:
            self.report.committed(version)
        return saved

    def restore(self, saved: Saved, step: int, regrouped_at: float, fault: FaultReport | None = None) -> None:
        """Restore a version with the other ranks, after a fault that this process has survived, or as it starts."""
        self.now = regrouped_at
        if fault is not None:
            self.report.faulted(Assignment(1, fault, fault.stopped_at))
        self.report.regrouped(())
        found = SimpleNamespace(snapshot=SimpleNamespace(version=Version(step, True)))
        self.report.fetched(cast("Complete", found), None, Moved(0, {}), step)
        self.report.resume(saved)


def died(rank: int, at: float, *earlier: FaultReport) -> FaultReport:
    """The report of an agent that knows of earlier faults which no committed step has followed."""
    known = tuple(fault.as_earlier for fault in earlier)
    return FaultReport(rank, 7, None, "SIGKILL", at, at, at, 1, 2, earlier=known)


def test_a_reported_recovery_is_not_part_of_the_next_one() -> None:
    """The agent of the second fault has not learned that a step was committed after the first one."""
    process = FirstRank()
    saved = process.step(1, 10.0)
    process.restore(saved, 1, 21.0, first := died(1, 20.0))
    saved = process.step(2, 22.0)
    process.restore(saved, 2, 31.0, died(0, 30.0, first))
    process.step(3, 32.0)
    assert process.recoveries == [("died by SIGKILL", 2.0), ("died by SIGKILL", 2.0)]
    assert process.report.counts.recoveries == 2


def test_a_recovery_includes_faults_of_other_nodes_that_interrupt_it() -> None:
    """An agent knows the faults of its own node only."""
    process = FirstRank()
    saved = process.step(1, 10.0)
    process.restore(saved, 1, 21.0, died(1, 20.0))
    process.restore(saved, 1, 24.0, died(0, 23.0))
    process.step(2, 25.0)
    assert process.recoveries == [(f"{FIRST}; then {SECOND}", 5.0)]


def test_a_recovery_whose_end_is_not_known_is_part_of_the_next_one() -> None:
    process = FirstRank()
    saved = process.step(1, 10.0)
    process.restore(saved, 1, 21.0, died(1, 20.0))
    saved = process.step(2, 22.0, learns=False)
    process.restore(saved, 2, 24.0, died(0, 23.0))
    process.step(3, 25.0)
    assert process.recoveries == [(f"{FIRST}; then {SECOND}", 5.0)]
    assert process.report.counts.recoveries == 1


def test_a_restored_version_shows_that_the_recovery_before_it_has_ended() -> None:
    process = FirstRank()
    saved = process.step(1, 10.0)
    process.restore(saved, 1, 21.0, first := died(1, 20.0))
    saved = process.step(2, 22.0)
    replacement = FirstRank(died(0, 30.0, first))
    replacement.restore(saved, 2, 31.0)
    replacement.step(3, 32.0)
    assert replacement.recoveries == [("died by SIGKILL", 2.0)]
    assert replacement.report.counts == RunCounts(recoveries=2, failures=2, regrouped_at=31.0)


@pytest.mark.parametrize("is_followed", [False, True])
def test_a_fault_after_the_training_loop_is_counted_once(is_followed: bool) -> None:
    process = FirstRank()
    saved = process.step(1, 10.0)
    process.restore(saved, 1, 21.0, first := died(1, 20.0))
    process.report.out_of_steps()
    assert process.report.counts.recoveries == 1
    relaunched = FirstRank(died(0, 30.0, first))
    relaunched.report.take_over(process.report.counts)
    plan = SimpleNamespace(action="restore", reason="")
    placement = SimpleNamespace(reason="")
    relaunched.report.started(
        Identity("run", "node", 1, True, Path("/nonexistent")),
        cast("Any", plan),
        cast("Any", placement),
        Path("/nonexistent"),
        fit_index=0,
        had_ended=True,
        is_followed=is_followed,
    )
    relaunched.restore(saved, 1, 31.0)
    relaunched.report.out_of_steps()
    assert relaunched.recoveries == ([] if is_followed else [("died by SIGKILL", 1.0)])
    assert relaunched.report.counts.recoveries == (1 if is_followed else 2)
