"""What is reported about a run, and where."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_ckptless.ledger import Ledger, read_ledger
from lightning_ckptless.protocol.mirror_interval import Costs, plan_interval
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.mirror.mirror import MirrorStats
from lightning_ckptless.trainer.reporting.rank_ledger import RankLedger
from lightning_ckptless.trainer.reporting.report import RunReport
from lightning_ckptless.trainer.reporting.tensorboard_layout import CHARTS
from tests.trainer.tiny import tiny_trainer


def report_of(trainer: Any, folder: Path) -> RunReport:
    """Report the first generation of a trainer to the ledger in a folder."""
    return RunReport(trainer, RankLedger(Ledger(folder / "ledger.jsonl"), lambda: 0, lambda: 1))


@pytest.mark.parametrize(("recoveries", "shown"), [(0, set[str]()), (1, {"goodput", "recoveries"})])
def test_the_progress_bar_is_as_under_ddp_until_a_recovery(recoveries: int, shown: set[str], tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    report = report_of(trainer, tmp_path)
    report.resume({**report.state(), "recoveries": recoveries})
    report.taken(0.0, 0.0, cast("Any", SimpleNamespace(stats=MirrorStats())))
    report.step_done()
    assert set(trainer.progress_bar_metrics) == shown


def test_tensorboard_is_told_which_values_share_a_chart(tmp_path: Path) -> None:
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
