"""Additional training dataloaders for virtual ranks, and training steps on their batches."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_ckptless.internals.lightning.distribution import distribution_of, fabric_module, module
from lightning_ckptless.internals.lightning.metrics import dump_metric, load_metric, metrics_of
from lightning_ckptless.internals.lightning.results import dump_results, load_results


def open_training_data(trainer: Any) -> Any:
    """Create another combined loader of the training dataloaders, set up like that of the fit loop."""
    distribution, fit = distribution_of(trainer), trainer.fit_loop
    connector = module(distribution, "trainer.connectors.data_connector")
    states = module(distribution, "trainer.states")
    combined_class = module(distribution, "utilities.combined_loader").CombinedLoader
    combined = connector._request_dataloader(fit._data_source)
    if not isinstance(combined, combined_class):
        combined = combined_class(combined, "max_size_cycle")
    combined.flattened = [
        connector._process_dataloader(trainer, states.TrainerFn.FITTING, states.RunningStage.TRAINING, loader)
        for loader in combined.flattened
    ]
    stage, limit = states.RunningStage.TRAINING, trainer.limit_train_batches
    lengths = [fabric_module(distribution, "utilities.data").sized_len(loader) for loader in combined.flattened]
    combined.limits = [
        connector._parse_num_batches(stage, float("inf") if length is None else length, limit) for length in lengths
    ]
    return combined


def hands_over_the_iterator(trainer: Any) -> bool:
    """Return whether `training_step` takes an iterator of batches instead of a batch."""
    step = trainer.lightning_module.training_step
    return callable(step) and "dataloader_iter" in inspect.signature(step).parameters


def to_device(trainer: Any, batch: Any) -> Any:
    """Prepare a batch for the training step: convert it and move it to the device."""
    call = module(distribution_of(trainer), "trainer.call")
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def tell_of_batch(trainer: Any, before: int, now: int) -> None:
    """Notify callbacks and model of a new number of batches per step, if they have a hook for it.

    Args:
        trainer: trainer in `fit`.
        before: previous number of batches per step, over all ranks.
        now: new number of batches per step, over all ranks.
    """
    model = trainer.lightning_module
    for callback in trainer.callbacks:
        if _has_batch_scale(callback):
            callback.on_batch_scale(trainer, model, before, now)
    if _has_batch_scale(model):
        model.on_batch_scale(before, now)


def _has_batch_scale(owner: Any) -> bool:
    # Checked on the class, as an object may have attributes of any name.
    return callable(getattr(type(owner), "on_batch_scale", None))


def current_batch(trainer: Any) -> Any:
    """Return the batch that the epoch loop currently trains on."""
    return trainer._results.batch


@contextmanager
def logs_kept(trainer: Any) -> Iterator[None]:
    """Context that preserves the values of `self.log` and the metrics."""
    metrics = metrics_of(trainer.lightning_module.named_modules())
    logged = copy.deepcopy(dump_results(trainer))
    gathered = {name: copy.deepcopy(dump_metric(metric)) for name, metric in metrics.items()}
    hook, batch = trainer.lightning_module._current_fx_name, current_batch(trainer)
    yield
    load_results(trainer, logged)
    trainer._results.batch = batch
    trainer.lightning_module._current_fx_name = hook
    for name, state in gathered.items():
        load_metric(metrics[name], state)


def training_loss(trainer: Any, batch: Any) -> Any:
    """Run the training step on a batch in addition to the current one; returns the loss for the backward pass.

    Values that it logs are accumulated as usual; values logged on step are those of the current batch.
    """
    distribution, epoch, results = distribution_of(trainer), trainer.fit_loop.epoch_loop, trainer._results
    closure_result = module(distribution, "loops.optimization.automatic").ClosureResult
    call = module(distribution, "trainer.call")
    current = results.batch, results.batch_size
    of_step = {key: metric._forward_cache for key, metric in results.items()}
    trainer._logger_connector.on_batch_start(batch)
    try:
        kwargs = epoch._build_kwargs(OrderedDict(), batch, epoch.batch_idx)
        output = call._call_strategy_hook(trainer, "training_step", *kwargs.values())
    finally:
        results.batch, results.batch_size = current
    for key, value in of_step.items():
        results[key]._forward_cache = value
    return closure_result.from_training_step_output(output, trainer.accumulate_grad_batches).closure_loss
