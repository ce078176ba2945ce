"""What is reported about a run, and where."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lightning_ckptless.ledger import Ledger, read_ledger
from lightning_ckptless.protocol.mirror_interval import Costs, plan_interval
from lightning_ckptless.replica.mirror.mirror import MirrorStats
from lightning_ckptless.trainer.reporting.report import RunReport
from tests.trainer.tiny import tiny_trainer


@pytest.mark.parametrize(("recoveries", "shown"), [(0, set[str]()), (1, {"goodput", "recoveries"})])
def test_the_progress_bar_is_as_under_ddp_until_a_recovery(recoveries: int, shown: set[str], tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    report = RunReport(trainer, Ledger(tmp_path / "ledger.jsonl"), 1)
    report.resume({**report.state(), "recoveries": recoveries})
    report.taken(0.0, 0.0, cast("Any", SimpleNamespace(stats=MirrorStats())))
    report.step_done()
    assert set(trainer.progress_bar_metrics) == shown


def test_the_ledger_keeps_the_costs_that_led_to_the_interval(tmp_path: Path) -> None:
    report = RunReport(tiny_trainer(tmp_path), Ledger(tmp_path / "ledger.jsonl"), 1)
    report.mirror_interval(5, plan_interval(Costs(0.5, 0.01, 1e-5, 1.0), 0.01))
    (event,) = read_ledger(tmp_path / "ledger.jsonl", only="mirror_interval")
    assert (event.fields["interval"], event.fields["step_s"], event.fields["version_s"]) == (5, 0.5, 0.01)
