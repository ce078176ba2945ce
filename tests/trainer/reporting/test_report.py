"""What is reported about a run, and where."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_ckptless import environment
from lightning_ckptless.ledger import Ledger, read_ledger
from lightning_ckptless.lightning_pytorch import CkptlessStrategy
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.worker.watcher import Assignment
from lightning_ckptless.metrics import Goodput
from lightning_ckptless.protocol.mirror_interval import Costs, plan_interval
from lightning_ckptless.protocol.rewind import PastRewinds, RewindPlan
from lightning_ckptless.protocol.run_counts import RunCounts
from lightning_ckptless.protocol.time_account import Bucket, TimeAccount
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.mirror.mirror import MirrorStats
from lightning_ckptless.trainer.reporting.rank_ledger import RankLedger
from lightning_ckptless.trainer.reporting.report import RunReport
from lightning_ckptless.trainer.reporting.tensorboard_layout import CHARTS
from lightning_ckptless.trainer.session.identity import Identity
from tests.trainer.tiny import tiny_trainer


def report_of(
    trainer: Any, folder: Path, clock: Callable[[], float] = time.time, *, own_agent: bool = True
) -> RunReport:
    """Report the first generation of a trainer to the ledger in a folder."""
    identity = Identity("run", "node", os.getpid(), own_agent=own_agent, run_root=folder)
    return RunReport(trainer, RankLedger(Ledger(folder / "ledger.jsonl"), lambda: 0, lambda: 1), identity, clock=clock)


@pytest.mark.parametrize(("recoveries", "shown"), [(0, set[str]()), (1, {"goodput", "recoveries"})])
def test_the_progress_bar_is_as_under_ddp_until_a_recovery(recoveries: int, shown: set[str], tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    report = report_of(trainer, tmp_path)
    report.resume({**report.state(Version(1, True)), "counts": asdict(RunCounts(recoveries))})
    report.taken(0.0, 0.0, cast("Any", SimpleNamespace(stats=MirrorStats())))
    report.step_done()
    assert set(trainer.progress_bar_metrics) == shown


def test_a_script_asks_the_strategy_where_the_time_went(tmp_path: Path) -> None:
    strategy = cast("Any", CkptlessStrategy())
    assert strategy.time_account is None
    report = report_of(tiny_trainer(tmp_path), tmp_path)
    strategy.engine = SimpleNamespace(session=SimpleNamespace(report=report))
    report.begin_training()
    first, second = (cast("TimeAccount", strategy.time_account) for _ in range(2))
    assert first.until <= second.until == second.began_at + sum(second.seconds.values())
    goodput = Goodput()
    goodput.update(second.productive_s, second.wall_s)
    assert goodput.compute().item() == pytest.approx(second.goodput)


def saved_until(report: RunReport, until: float) -> dict[str, Any]:
    """The accounts of a version that another process has captured after 100 s of training."""
    account = TimeAccount(until - 100.0)
    account.advance(until, Bucket.TRAINING)
    return report.state(Version(1, True)) | {"time": {"account": account.to_dict(), "own_s": 0.0, "batches": 0}}


def test_the_time_without_an_agent_is_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.AGENT_STARTED_AT, "2000.0")
    now = [2100.0]
    report = report_of(tiny_trainer(tmp_path), tmp_path, clock=lambda: now[0])
    now[0] = 2130.0
    report.resume(saved_until(report, 1500.0))
    assert report.account.seconds == {"training": 100.0, "idle": 500.0, "regroup": 100.0, "restore": 30.0}


def test_another_launcher_reports_no_fault(tmp_path: Path) -> None:
    started_at = psutil.Process().create_time()
    now = [started_at + 3.0]
    report = report_of(tiny_trainer(tmp_path), tmp_path, clock=lambda: now[0], own_agent=False)
    now[0] += 4.0
    report.resume(saved_until(report, started_at - 50.0))
    seconds = report.account.seconds
    assert seconds == pytest.approx({"training": 100.0, "detect": 50.0, "regroup": 3.0, "restore": 4.0})


def test_a_world_that_grows_and_a_rewind_are_no_failures(tmp_path: Path) -> None:
    # Later than the start of the agent.
    now = [time.time() + 1000.0]
    trainer = tiny_trainer(tmp_path)
    report = report_of(trainer, tmp_path, clock=lambda: now[0])
    report.begin_training()
    saved = report.state(Version(1, True))
    now[0] += 3.0
    report.rewinding(RewindPlan(Version(3, True), 5, 0, 0, PastRewinds(), "from step 5 to step 3"))
    now[0] += 2.0
    report.resume(saved)
    assert report.account.seconds[Bucket.REWIND] == pytest.approx(5.0)
    fault = FaultReport(None, None, None, None, now[0] + 1, now[0] + 1, now[0] + 2, 1, world_size=0)
    report.faulted(Assignment(1, fault, now[0] + 1))
    saved = report.state(Version(1, True))
    now[0] += 5.0
    report.resume(saved)
    assert report.account.seconds[Bucket.ELASTIC_TRANSITION] == pytest.approx(4.0)
    assert report.counts.failures == 0


def test_tensorboard_learns_which_values_share_a_chart(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    trainer = tiny_trainer(tmp_path, logger=logger, log_every_n_steps=1)
    report = report_of(trainer, tmp_path)
    for _ in range(2):
        report.taken(0.0, 0.0, cast("Any", SimpleNamespace(stats=MirrorStats())))
        report.step_done()
    logger.experiment.close()
    events = EventAccumulator(logger.log_dir).Reload()
    (written,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert charts.keys() == CHARTS.keys()
    # Every value is in one chart, and every chart has its values.
    shown = [tag for tags in charts.values() for tag in tags]
    assert sorted(tag.strip("^$") for tag in shown) == sorted(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("changes", "of"),
    [
        ({}, 40),
        ({"estimated_stepping_batches": float("inf")}, None),
        ({"estimated_stepping_batches": -1}, None),
        ({"train_dataloader": None}, None),
        ({"lightning_module": SimpleNamespace(automatic_optimization=False)}, None),
    ],
)
def test_the_ledger_says_how_many_steps_there_will_be(changes: dict[str, Any], of: int | None, tmp_path: Path) -> None:
    module = SimpleNamespace(automatic_optimization=True)
    known = {"lightning_module": module, "train_dataloader": object(), "estimated_stepping_batches": 40}
    report = report_of(SimpleNamespace(global_rank=0, **(known | changes)), tmp_path)
    report.committed(Version(7, True))
    (event,) = read_ledger(tmp_path / "ledger.jsonl", only="committed")
    assert (event.fields["step"], event.fields["of"]) == (7, of)


def test_the_ledger_keeps_the_costs_that_led_to_the_interval(tmp_path: Path) -> None:
    report = report_of(tiny_trainer(tmp_path), tmp_path)
    report.mirror_interval(5, plan_interval(Costs(0.5, 0.01, 1e-5, 1.0), 0.01))
    (event,) = read_ledger(tmp_path / "ledger.jsonl", only="mirror_interval")
    assert (event.fields["interval"], event.fields["step_s"], event.fields["version_s"]) == (5, 0.5, 0.01)


def test_a_process_that_a_world_change_makes_rank_0_reports_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path)
    report, plan = report_of(trainer, tmp_path), plan_interval(Costs(0.5, 0.01, 1e-5, 1.0), 0.01)
    for rank, interval in ((1, 5), (0, 6), (2, 7)):
        monkeypatch.setattr(trainer.strategy, "global_rank", rank)
        report.mirror_interval(interval, plan)
    assert [event.fields["interval"] for event in read_ledger(tmp_path / "ledger.jsonl")] == [6]
