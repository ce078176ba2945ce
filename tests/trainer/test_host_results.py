"""Logged values and metrics survive a dump and load through Lightning's private names unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.internals.lightning.metrics import dump_metric, load_metric, metrics_of
from lightning_ckptless.internals.lightning.results import (
    dump_results,
    load_results,
    logs_are_due,
    show_on_progress_bar,
)
from tests.trainer.tiny import DISTRIBUTIONS, callback, tiny_loader, tiny_module, tiny_trainer

# ---------------------------------------------------------------------- results


def logging_module(distribution: str) -> Any:
    """Make a module that logs in every possible way."""
    base: Any = type(tiny_module(distribution))

    class Logging(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.counted = torchmetrics.SumMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch[0]).square().mean()
            for reduce_fx in ("mean", "sum", "max", "min"):
                self.log(f"{reduce_fx}_epoch", loss, on_step=False, on_epoch=True, reduce_fx=reduce_fx, prog_bar=True)
                self.log(f"{reduce_fx}_both", loss, on_step=True, on_epoch=True, reduce_fx=reduce_fx, sync_dist=True)
            self.log("step", loss, on_step=True, on_epoch=False, logger=False)
            self.log("rank_zero", loss, on_step=True, rank_zero_only=True)
            self.counted(torch.tensor(batch_idx + 1.0))
            self.log("counted", self.counted, on_step=True, on_epoch=True)
            return loss

    return Logging()


def _described(results: Any) -> dict[str, Any]:
    return {
        key: (
            metric.meta,
            metric.is_tensor,
            metric.has_reset,
            metric._update_count,
            metric.value if metric.is_tensor else None,
            metric._forward_cache,
        )
        for key, metric in results.items()
    }


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_logged_values_are_restored_with_their_metadata(distribution: str, tmp_path: Path) -> None:
    seen: list[int] = []
    reset: list[bool] = []

    def round_trip(trainer: Any, *_: Any) -> None:
        results = trainer.fit_loop.epoch_loop._results
        connector = trainer._logger_connector
        metrics = {
            name: dict(getattr(connector, f"_{name}_metrics")) for name in ("progress_bar", "logged", "callback")
        }
        before, size = _described(results), results.batch_size
        old = dict(results)
        load_results(trainer, unpack(pack(dump_results(trainer))))
        assert _described(results) == before
        assert results.batch_size == size
        for key, metric in results.items():
            assert metric is not old[key]
            assert metric.update_called == old[key].update_called
            if metric.meta.on_epoch and metric.update_called:
                assert torch.equal(metric.compute(), old[key].compute()), key
                metric._computed = old[key]._computed = None
        for name, values in metrics.items():
            assert getattr(connector, f"_{name}_metrics") == values
        seen.append(len(results))
        reset.append(all(metric.has_reset for metric in results.values()))

    hooks = callback(distribution, on_train_batch_end=round_trip, on_train_epoch_start=round_trip)
    trainer = tiny_trainer(tmp_path, distribution, max_epochs=2, callbacks=[hooks])
    trainer.fit(logging_module(distribution), tiny_loader(), tiny_loader())
    assert seen == [0, *[11] * 9]
    # Between epochs the values are those of the previous one; the first new value discards them.
    assert reset == [True, *[False] * 4, True, *[False] * 4]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_reload_does_not_change_epoch_values(distribution: str, tmp_path: Path) -> None:
    def reload(trainer: Any, *_: Any) -> None:
        load_results(trainer, unpack(pack(dump_results(trainer))))

    values = []
    for number, hooks in enumerate(({}, {"on_train_batch_end": reload})):
        torch.manual_seed(0)
        trainer = tiny_trainer(tmp_path / str(number), distribution, callbacks=[callback(distribution, **hooks)])
        trainer.fit(logging_module(distribution), tiny_loader(), tiny_loader())
        values.append(trainer.callback_metrics)
    assert values[0] == values[1]
    assert set(values[0]) > {"mean_both_epoch", "max_epoch", "counted_epoch", "counted_step", "val_loss"}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_our_values_are_shown_on_the_progress_bar(distribution: str, tmp_path: Path) -> None:
    due: list[bool] = []

    def show(trainer: Any, *_: Any) -> None:
        show_on_progress_bar(trainer, {"goodput": 0.5})
        assert trainer.progress_bar_metrics["goodput"] == 0.5
        due.append(logs_are_due(trainer))

    trainer = tiny_trainer(
        tmp_path, distribution, log_every_n_steps=2, callbacks=[callback(distribution, on_train_batch_start=show)]
    )
    trainer.fit(tiny_module(distribution), tiny_loader())
    assert due == [False, True, False, True]


# ---------------------------------------------------------------------- torchmetrics


@pytest.mark.parametrize("name", ["_defaults", "_reductions", "_update_count", "_computed", "_forward_cache"])
def test_torchmetrics_still_has_the_private_name(name: str) -> None:
    assert hasattr(torchmetrics.MeanMetric(), name), f"torchmetrics has moved Metric.{name}"


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (torchmetrics.MeanMetric, [torch.tensor(1.0), torch.tensor(4.0)]),
        (torchmetrics.CatMetric, [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]),
        (torchmetrics.MaxMetric, [torch.tensor(3.0)]),
        (lambda: torchmetrics.Accuracy(task="multiclass", num_classes=3), []),
    ],
    ids=["mean", "cat", "max", "unused"],
)
def test_a_restored_metric_continues(make: Any, values: list[torch.Tensor]) -> None:
    metric, fresh = make(), make()
    for value in values:
        metric(value)
    if values:
        metric.compute()
    load_metric(fresh, unpack(pack(dump_metric(metric))))
    assert fresh.update_count == metric.update_count == len(values)
    assert fresh.update_called == metric.update_called
    if values:
        assert torch.equal(fresh._forward_cache, metric._forward_cache)
        assert torch.equal(fresh.compute(), metric.compute())
        for either in (metric, fresh):
            either.update(torch.tensor(7.0))
        assert torch.equal(fresh.compute(), metric.compute())


def test_a_metric_that_was_reset_is_empty_again() -> None:
    metric = torchmetrics.CatMetric()
    metric.update(torch.ones(2))
    empty = unpack(pack(dump_metric(torchmetrics.CatMetric())))
    load_metric(metric, empty)
    assert metric.value == []
    assert not metric.update_called


def test_metrics_are_found_in_collections() -> None:
    root = torch.nn.Module()
    root.all = torchmetrics.MetricCollection({"mean": torchmetrics.MeanMetric(), "sum": torchmetrics.SumMetric()})
    root.layer = torch.nn.Linear(1, 1)
    assert set(metrics_of(root.named_modules())) == {"all.mean", "all.sum"}
