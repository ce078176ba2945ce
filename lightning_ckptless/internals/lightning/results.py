"""Values logged in the current epoch, as accumulated by `self.log` so far.

Lightning keeps them in result collections that cannot be saved, as they refer to a bound method of the strategy. We
save their values and metadata, and rebuild them with the new strategy.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_ckptless.internals.lightning.distribution import distribution_of, module

_RESULT_MODULE = "trainer.connectors.logger_connector.result"
_META_FIELDS = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)
_CONNECTOR_FIELDS = (
    "_progress_bar_metrics",
    "_logged_metrics",
    "_callback_metrics",
    "_current_fx",
    "_first_loop_iter",
)


def dump_results(trainer: Any) -> dict[str, Any]:
    """Return the accumulated values of training and validation, as plain data and tensors."""
    epoch = trainer.fit_loop.epoch_loop
    connector = trainer._logger_connector
    return {
        "training": _dump(epoch._results),
        "validation": _dump(epoch.val_loop._results),
        "connector": {
            name: dict(value) if isinstance(value := getattr(connector, name), dict) else value
            for name in _CONNECTOR_FIELDS
        },
    }


def load_results(trainer: Any, saved: dict[str, Any]) -> None:
    """Restore the accumulated values in a trainer whose model and strategy are set up."""
    epoch = trainer.fit_loop.epoch_loop
    _load(trainer, epoch._results, saved["training"])
    _load(trainer, epoch.val_loop._results, saved["validation"])
    for name, value in saved["connector"].items():
        setattr(trainer._logger_connector, name, dict(value) if isinstance(value, dict) else value)
    trainer.lightning_module._current_fx_name = None


def _dump(results: Any) -> dict[str, Any]:
    return {
        "items": {key: _dump_one(metric) for key, metric in results.items()},
        "batch_size": results.batch_size,
        "dataloader_idx": results.dataloader_idx,
    }


def _dump_one(metric: Any) -> dict[str, Any]:
    sync = metric.meta.sync
    saved = {
        "meta": {name: getattr(metric.meta, name) for name in _META_FIELDS},
        "reduce_fx": metric.meta.reduce_fx.__name__,
        "sync": (sync.should, sync.op, sync.rank_zero_only),
        "is_tensor": metric.is_tensor,
        "has_reset": metric.has_reset,
        "forward_cache": metric._forward_cache,
        "computed": metric._computed,
        "update_count": metric._update_count,
    }
    if metric.is_tensor:
        saved["value"] = metric.value
        if metric.meta.is_mean_reduction:
            saved["cumulated_batch_size"] = metric.cumulated_batch_size
    return saved


def _load(trainer: Any, results: Any, saved: dict[str, Any]) -> None:
    results.clear()
    results.batch = None
    results.batch_size = saved["batch_size"]
    results.dataloader_idx = saved["dataloader_idx"]
    for key, item in saved["items"].items():
        results[key] = _load_one(trainer, item)


def _load_one(trainer: Any, saved: dict[str, Any]) -> Any:
    types = module(distribution_of(trainer), _RESULT_MODULE)
    should, op, rank_zero_only = saved["sync"]
    meta = types._Metadata(**saved["meta"], reduce_fx=saved["reduce_fx"])
    meta.sync = types._Sync(_should=should, fn=trainer.strategy.reduce, _op=op, rank_zero_only=rank_zero_only)
    metric = types._ResultMetric(meta, saved["is_tensor"])
    if saved["is_tensor"]:
        metric.value = _own(saved["value"])
        if meta.is_mean_reduction:
            metric.cumulated_batch_size = _own(saved["cumulated_batch_size"])
    else:
        metric.value = trainer.lightning_module.get_submodule(saved["meta"]["metric_attribute"])
    metric.has_reset = saved["has_reset"]
    metric._forward_cache = _own(saved["forward_cache"])
    metric._computed = _own(saved["computed"])
    metric._update_count = saved["update_count"]
    device = trainer.lightning_module.device
    return metric.to(device) if device.type != "cpu" else metric


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def show_on_progress_bar(trainer: Any, values: dict[str, float]) -> None:
    """Show values on the progress bar, in addition to those logged with `prog_bar=True`."""
    trainer._logger_connector._progress_bar_metrics.update(values)


def logs_are_due(trainer: Any) -> bool:
    """Return whether the loggers receive the current step."""
    return bool(trainer._logger_connector.should_update_logs)
