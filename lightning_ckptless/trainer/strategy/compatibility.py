"""Refuses or warns of what cannot be restored exactly, before training starts rather than after a fault."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.lightning.ddp import model_averaging_period
from lightning_ckptless.internals.lightning.virtual_ranks import hands_over_the_iterator
from lightning_ckptless.internals.torch_internals import gradient_hooks, leaves_of, map_tensors
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.trainer.data.loader import iterates_in_its_own_way
from lightning_ckptless.trainer.state.plain_values import is_plain
from lightning_ckptless.trainer.state.tensors import attributes_of_all_optimizers

log = logging.getLogger(__name__)


def check_trainer(trainer: Any, options: CkptlessOptions) -> None:
    """Check a trainer that is set up for `fit`.

    Args:
        trainer: the trainer.
        options: the user's settings.

    Raises:
        OptionsError: the trainer has state that no version would contain, or an option does not fit it.
    """
    for finding in _refusals(trainer):
        raise OptionsError(finding)
    _require_known(options.stateless_callbacks, trainer.callbacks)
    if options.replay_check_every is not None and (obstacle := _obstacle_to_replay(trainer)):
        raise OptionsError(f"replay_check_every={options.replay_check_every}: {obstacle}, or leave out the option")
    if options.drain_stragglers_after_s is not None and _waits_in_forward(trainer.strategy.model):
        raise OptionsError(
            "drain_stragglers_after_s: the model has buffers, which DDP sends from rank 0 to all ranks before each "
            "forward pass, so a rank that waits there for a slow one looks slow itself, and might be drained in its "
            "place. Set broadcast_buffers=False, or leave the option out: stragglers are still reported"
        )
    for index, optimizer in enumerate(trainer.optimizers):
        if trainer.is_global_zero and (names := opaque_attributes(optimizer)):
            log.warning(
                "ckptless: optimizer %d (%s) keeps objects in %s, whose contents are not restored after a fault; keep "
                "values that change in `self.state`, or as numbers in separate attributes",
                index, type(optimizer).__name__, ", ".join(names),
            )  # fmt: skip


def _obstacle_to_replay(trainer: Any) -> str:
    """Why another rank cannot run this rank's micro-batch again, and what to change; empty if it can."""
    model = trainer.lightning_module
    if trainer.world_size == 1:
        return "there is no other rank to run a micro-batch again: start two ranks or more"
    if not trainer.strategy.replicates:
        return "no other rank has the weights of a sharded model: use CkptlessStrategy"
    if not model.automatic_optimization:
        return "the training step changes the weights itself (automatic_optimization=False): let Lightning do it"
    if hands_over_the_iterator(trainer):
        return "training_step takes an iterator of batches (dataloader_iter): let it take a batch"
    hooked = [name for name, parameter in model.named_parameters() if gradient_hooks(parameter)]
    if hooked:
        return f"{hooked[0]} has a gradient hook, which would run more often: move it to on_after_backward"
    if model.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        return "the device may round sums differently each time: set Trainer(deterministic=True)"
    return ""


def _waits_in_forward(model: Any) -> bool:
    is_replicated = isinstance(model, DistributedDataParallel)
    return is_replicated and model.broadcast_buffers and next(model.module.buffers(), None) is not None


def _require_known(names: Iterable[str], callbacks: Iterable[object]) -> None:
    """Refuse class names that match none of the trainer's callbacks: they are typing errors."""
    known = frozenset[str]().union(*(names_of_class(type(callback)) for callback in callbacks))
    for name in names:
        if name not in known:
            raise OptionsError(
                f"stateless_callbacks contains {name!r}, but the trainer's callbacks are "
                f"{', '.join(sorted(name for name in known if '.' not in name)) or 'none'}"
            )


def names_of_class(cls: type) -> frozenset[str]:
    """Names by which an option may refer to a class."""
    return frozenset((cls.__name__, f"{cls.__module__}.{cls.__qualname__}"))


def _refusals(trainer: Any) -> Iterator[str]:
    for index, optimizer in enumerate(trainer.optimizers):
        # Compared by name: importing the class compiles TorchScript for half a second.
        if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
            yield (
                f"optimizer {index} is a ZeroRedundancyOptimizer, which shards its own state, so that it is not "
                "replicated across ranks; use the optimizer that it wraps"
            )
        if names := hidden_tensors(optimizer):
            yield (
                f"optimizer {index} ({type(optimizer).__name__}) keeps tensors in {', '.join(names)}, outside its "
                "`state`, so that no version would contain them; keep them in `self.state[parameter]`"
            )
        if names := inner_optimizers(optimizer):
            yield (
                f"optimizer {index} ({type(optimizer).__name__}) wraps another one in {', '.join(names)}, whose state "
                "no version would contain; let both share one `state`, as in `self.state = inner.state`"
            )
    if model_averaging_period(trainer.strategy) is not None:
        yield "model_averaging_period: parameters that differ between ranks are not mirrored; remove this option"


def hidden_tensors(optimizer: Any) -> list[str]:
    """Attributes of an optimizer that contain tensors other than its parameters, groups and state.

    Single-element tensors do not count: fused optimizers keep an overflow flag that way.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [
        name
        for name, value in vars(optimizer).items()
        if name not in {"param_groups", "state", "defaults"}
        and any(t.numel() > 1 and id(t) not in known for t in _tensors_in(value))
    ]


def inner_optimizers(optimizer: Any) -> list[str]:
    """Attributes of an optimizer that contain another optimizer with its own state."""
    return [
        name
        for name, value in vars(optimizer).items()
        if any(isinstance(v, torch.optim.Optimizer) and v.state is not optimizer.state for v in leaves_of(value))
    ]


def opaque_attributes(optimizer: Any) -> list[str]:
    """Attributes of a third-party optimizer whose changes cannot be detected."""
    if type(optimizer).__module__.startswith("torch."):
        return []
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}

    def is_seen(value: Any) -> bool:
        return id(value) in known or callable(value) or isinstance(value, torch.optim.Optimizer) or is_plain(value)

    left = attributes_of_all_optimizers()
    return [
        name for name, value in vars(optimizer).items() if name not in left and not all(map(is_seen, leaves_of(value)))
    ]


def _tensors_in(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(found.append, value)
    return found


def warn_of_loaders(loaders: Iterable[object]) -> None:
    """Warn once, at the start, of what a recovery costs or loses with the training dataloaders.

    Args:
        loaders: dataloaders in the trainer's order.
    """
    for position, loader in enumerate(loaders):
        for finding in _loader_findings(loader):
            log.warning("ckptless: training dataloader %d (%s): %s", position, type(loader).__name__, finding)


def _loader_findings(loader: object) -> Iterator[str]:
    if not isinstance(loader, DataLoader):
        yield "is no DataLoader: after a fault it is read again from its beginning, and must yield the same batches"
        return
    states_itself = callable(getattr(loader, "state_dict", None))
    streams = isinstance(loader.dataset, IterableDataset) and not states_itself
    if streams:
        yield "an iterable dataset is read again from the start of the epoch after a fault"
    elif iterates_in_its_own_way(loader) and not states_itself:
        yield "has its own iteration: after a fault it is read again from its start, and must yield the same batches"
    if streams and loader.persistent_workers:
        yield (
            "random numbers drawn in its persistent workers start over after a fault: remove persistent_workers, or "
            "draw them in the training process"
        )
    if states_itself and loader.num_workers > 0:
        yield "random numbers drawn in its workers are not restored after a fault; draw them in the training process"
    if loader.num_workers > 0 and not loader.in_order:
        yield "in_order=False lets batches arrive in any order, which may differ after a fault"
