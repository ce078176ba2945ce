"""What cannot be made exact is refused or named before training starts, not discovered after a fault."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.lightning.ddp import model_averaging_period
from lightning_ckptless.internals.torch_internals import leaves_of, map_tensors
from lightning_ckptless.trainer.data.loader import iterates_in_its_own_way
from lightning_ckptless.trainer.state.plain_values import is_plain
from lightning_ckptless.trainer.state.tensors import attributes_of_all_optimizers

log = logging.getLogger(__name__)


def check_trainer(trainer: Any, stateless_callbacks: Iterable[str] = ()) -> None:
    """Look at callbacks and optimizers of a trainer that is set up for `fit`.

    Args:
        trainer: the trainer.
        stateless_callbacks: class names that the user gave for that option.

    Raises:
        OptionsError: something in it keeps state that no version would hold.
    """
    for finding in _refusals(trainer):
        raise OptionsError(finding)
    _require_known(stateless_callbacks, trainer.callbacks)
    for index, optimizer in enumerate(trainer.optimizers):
        if trainer.is_global_zero and (names := opaque_attributes(optimizer)):
            log.warning(
                "ckptless: optimizer %d (%s) keeps objects in %s: what is in them is not restored after a fault; keep "
                "what changes in `self.state`, or as numbers in attributes of its own",
                index, type(optimizer).__name__, ", ".join(names),
            )  # fmt: skip


def _require_known(names: Iterable[str], callbacks: Iterable[object]) -> None:
    """Refuse names of callbacks that the trainer does not have, which are slips of the pen."""
    known = frozenset[str]().union(*(names_of_class(type(callback)) for callback in callbacks))
    for name in names:
        if name not in known:
            raise OptionsError(
                f"stateless_callbacks names {name!r}; the trainer's callbacks are "
                f"{', '.join(sorted(name for name in known if '.' not in name)) or 'none'}"
            )


def names_of_class(cls: type) -> frozenset[str]:
    """By which an option may name a class."""
    return frozenset((cls.__name__, f"{cls.__module__}.{cls.__qualname__}"))


def _refusals(trainer: Any) -> Iterator[str]:
    for index, optimizer in enumerate(trainer.optimizers):
        # By name: importing the class compiles scripts for half a second.
        if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
            yield (
                f"optimizer {index} is a ZeroRedundancyOptimizer: its state is sharded by itself, outside of what "
                "data parallelism replicates; use the optimizer that it wraps"
            )
        if names := hidden_tensors(optimizer):
            yield (
                f"optimizer {index} ({type(optimizer).__name__}) keeps tensors in {', '.join(names)}, outside of its "
                "`state`, where no version would hold them; keep them in `self.state[parameter]`"
            )
        if names := inner_optimizers(optimizer):
            yield (
                f"optimizer {index} ({type(optimizer).__name__}) wraps another one in {', '.join(names)}, whose state "
                "no version would hold; let both have the same `state`, as in `self.state = inner.state`"
            )
    if model_averaging_period(trainer.strategy) is not None:
        yield "model_averaging_period: parameters that differ between ranks are not mirrored; leave it out"


def hidden_tensors(optimizer: Any) -> list[str]:
    """Attributes of an optimizer that hold tensors other than its parameters, beside its groups and its state.

    One number alone is left out: fused optimizers keep a flag for overflows that way.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [
        name
        for name, value in vars(optimizer).items()
        if name not in {"param_groups", "state", "defaults"}
        and any(t.numel() > 1 and id(t) not in known for t in _tensors_in(value))
    ]


def inner_optimizers(optimizer: Any) -> list[str]:
    """Attributes of an optimizer that hold another one with a state of its own."""
    return [
        name
        for name, value in vars(optimizer).items()
        if any(isinstance(v, torch.optim.Optimizer) and v.state is not optimizer.state for v in leaves_of(value))
    ]


def opaque_attributes(optimizer: Any) -> list[str]:
    """Attributes of an optimizer that is not torch's in which nobody can see what changes."""
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
    """Say once, at the start, what training dataloaders cost or lose on a recovery.

    Args:
        loaders: as the trainer uses them, in order.
    """
    for position, loader in enumerate(loaders):
        for finding in _loader_findings(loader):
            log.warning("ckptless: training dataloader %d (%s): %s", position, type(loader).__name__, finding)


def _loader_findings(loader: object) -> Iterator[str]:
    if not isinstance(loader, DataLoader):
        yield "is no DataLoader: after a fault its batches are read again from its beginning, which must give the same"
        return
    states_itself = callable(getattr(loader, "state_dict", None))
    streams = isinstance(loader.dataset, IterableDataset) and not states_itself
    if streams:
        yield "an iterable dataset is read again from the start of the epoch after a fault"
    elif iterates_in_its_own_way(loader) and not states_itself:
        yield "iterates in a way of its own: after a fault it is read again from its start, which must give the same"
    if streams and loader.persistent_workers:
        yield (
            "random numbers drawn in its persistent workers begin anew after a fault: leave persistent_workers out, or "
            "draw them in the training process"
        )
    if states_itself and loader.num_workers > 0:
        yield "random numbers drawn in its workers are not restored after a fault; draw them in the training process"
    if loader.num_workers > 0 and not loader.in_order:
        yield "in_order=False lets batches arrive in any order: after a fault it may be another one"
