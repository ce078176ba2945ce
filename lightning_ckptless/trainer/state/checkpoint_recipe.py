"""The parts of a Lightning checkpoint that do not change in training: names, keys and hyper-parameters."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ckptless.durable.recipe import Recipe
from lightning_ckptless.formats.packing import pack
from lightning_ckptless.internals.lightning.checkpoint import average_of, hparams_name
from lightning_ckptless.internals.lightning.distribution import distribution_of, is_a, module
from lightning_ckptless.internals.lightning.metrics import default_names, metrics_of
from lightning_ckptless.replica.layout.tensor_spec import local_part
from lightning_ckptless.trainer.state.plain_values import HEAVY_BYTES
from lightning_ckptless.trainer.state.tensors import optimizer_parameters

log = logging.getLogger(__name__)

_EXTRA_STATE = "_extra_state"
_WARNED = set[str]()
"""Hyper-parameters already warned about in this process."""


def recipe_of(trainer: Any, tensors: Mapping[str, Tensor], callbacks: list[Any]) -> Recipe:
    """Describe how a checkpoint of this trainer is assembled.

    Args:
        trainer: in `fit`.
        tensors: its large tensors by our names; for sharded tensors, the local part.
        callbacks: the callbacks whose state is part of a version, in order.
    """
    model = trainer.lightning_module
    state = model.state_dict()
    paths = {f"{path}." if path else "": path for path, _ in model.named_modules()}
    extra = {key: paths[stem] for key in state if (stem := _stem(key, _EXTRA_STATE)) in paths}
    metric = {
        f"{path}.{name}": (path, name)
        for path, found in metrics_of(model.named_modules()).items()
        for name in default_names(found)
        if f"{path}.{name}" in state
    }
    known = _named(state, tensors)
    return Recipe(
        lightning_version=str(module(distribution_of(trainer)).__version__),
        state_dict=known,
        extra_state=extra,
        metric_state=metric,
        parameters=[_groups(trainer, index) for index in range(len(trainer.optimizers))],
        # A test double may return a non-string: keys in a checkpoint file are text.
        callback_keys=[str(callback.state_key) for callback in callbacks],
        precision_key=type(trainer.precision_plugin).__qualname__,
        datamodule_key=None if trainer.datamodule is None else type(trainer.datamodule).__qualname__,
        hyper_parameters=_hyper_parameters(model) | _hyper_parameters(trainer.datamodule),
        other_loops={
            f"{name}_loop": getattr(trainer, f"{name}_loop").state_dict() for name in ("validate", "test", "predict")
        },
        averaged=_averaged(callbacks, tensors),
        lacking=tuple(key for key in state if key not in known and key not in extra and key not in metric),
    )


def _stem(key: str, end: str) -> str | None:
    return key.removesuffix(end) if key.endswith(end) else None


def _groups(trainer: Any, index: int) -> list[list[str]]:
    """Return the parameter names of each group, in the order in which a state dict numbers them."""
    names = {id(parameter): name for name, parameter in optimizer_parameters(trainer, index).items()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in trainer.optimizers[index].param_groups]


def _averaged(callbacks: list[Any], tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
    for callback in callbacks:
        if is_a(callback, "callbacks", "WeightAveraging") and (average := average_of(callback)) is not None:
            return _named(average.state_dict(), tensors)
    return None


def _named(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return our name for each tensor of a `state_dict`, matched by memory since its tensors are different objects."""
    names = {_place(tensor): name for name, tensor in tensors.items() if not name.startswith("optimizer/")}
    known = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            place = _place(local_part(value))
            same = [f"{kind}/{key}" for kind in ("parameter", "buffer") if f"{kind}/{key}" in tensors]
            name = same[0] if same else names.get(place)
            if name is not None and _place(tensors[name]) == place:
                known[key] = name
    return known


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _hyper_parameters(owner: Any) -> dict[str, Any]:
    """Return the hyper-parameters as Lightning stores them, without unpicklable or large ones such as a model."""
    if owner is None or not owner.hparams:
        return {}
    found: dict[str, Any] = {}
    if (name := hparams_name(owner)) is not None:
        found[owner.CHECKPOINT_HYPER_PARAMS_NAME] = name
    if is_container := type(owner.hparams).__module__.startswith("omegaconf"):
        found[owner.CHECKPOINT_HYPER_PARAMS_TYPE] = type(owner.hparams)
    kept = owner.hparams if is_container else {k: v for k, v in owner.hparams.items() if _fits(k, v)}
    return found | {owner.CHECKPOINT_HYPER_PARAMS_KEY: kept}


def _fits(name: str, value: Any) -> bool:
    problem = ""
    try:
        if isinstance(value, nn.Module) and sum(p.nbytes for p in value.parameters()) > HEAVY_BYTES:
            problem = f"it is a module larger than {HEAVY_BYTES // 1_000_000} MB"
        elif len(pack(value)) > HEAVY_BYTES:
            problem = f"it is larger than {HEAVY_BYTES // 1_000_000} MB"
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        problem = str(error)
    if problem and name not in _WARNED:
        _WARNED.add(name)
        log.warning("ckptless: the hyper-parameter %s is left out of exported checkpoints: %s", name, problem)
    return not problem
