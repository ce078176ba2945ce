"""Converts a version to the Lightning checkpoint that `Trainer.save_checkpoint` would have written at that step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lightning_ckptless.durable.capture import Captured
from lightning_ckptless.durable.host_state_pickle import read_pickle
from lightning_ckptless.durable.recipe import Recipe, unseal_recipe
from lightning_ckptless.errors import DurableError
from lightning_ckptless.replica.layout.layout import local_name, part_of, slot_views

_RANK = 0
"""Rank whose buffers and host state go into a checkpoint; Lightning's checkpoints are written by rank 0."""


def tensors_of(captured: Captured) -> dict[str, Tensor]:
    """Return the unsharded tensors of rank 0, by our names."""
    layout = captured.layout
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in layout.known_to(_RANK).items()}
    for shard, copy in enumerate(captured.shards):
        for piece, view in zip(layout.of(shard), slot_views(layout, shard, copy.bulk), strict=True):
            whole = tensors.get(local_name(piece, _RANK))
            if whole is not None:
                part_of(whole, piece, (0,) * whole.dim()).copy_(view)
    return tensors


def recipe_in(captured: Captured) -> Recipe:
    """Return the recipe for a checkpoint of a version.

    Raises:
        DurableError: there is no recipe, it is damaged, or a version lacks a part of the checkpoint.
    """
    if not captured.recipe:
        raise DurableError(
            f"{captured.snapshot.version}: the run has stored no recipe for a checkpoint; use format dcp, which "
            "exports the tensors only"
        )
    recipe = read_pickle(unseal_recipe(captured.recipe))
    if not isinstance(recipe, Recipe) or vars(recipe).keys() != {field.name for field in fields(Recipe)}:
        raise DurableError(f"{captured.snapshot.version}: its recipe was written by another release")
    if recipe.lacking:
        raise DurableError(
            f"the model's state_dict has {', '.join(recipe.lacking[:3])}, which is not a tensor of the state (does a "
            "hook create it?), so a checkpoint would lack it; use format dcp, which exports the tensors only"
        )
    return recipe


def model_state(recipe: Recipe, host_state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Build the model's `state_dict`."""
    state: dict[str, Any] = {key: tensors[name] for key, name in recipe.state_dict.items()}
    state |= {key: host_state["module"]["extra_state"][path] for key, path in recipe.extra_state.items()}
    return state | {
        key: host_state["metrics"][path]["states"][name] for key, (path, name) in recipe.metric_state.items()
    }


def host_state_of(captured: Captured) -> dict[str, Any]:
    """Return the host state of rank 0."""
    state: dict[str, Any] = read_pickle(captured.shards[_RANK].blob)["state"]
    return state


def lightning_checkpoint(captured: Captured) -> dict[str, Any]:
    """Build Lightning's checkpoint dictionary from a version.

    Raises:
        DurableError: there is no recipe, or a version lacks a part of the checkpoint.
    """
    recipe, host_state, tensors = recipe_in(captured), host_state_of(captured), tensors_of(captured)
    if host_state["checkpoint"] is not None:
        # The run has stored the complete dictionary after calling the script's own checkpoint hooks.
        complete: dict[str, Any] = read_pickle(host_state["checkpoint"], tensors)
        return complete
    loops = host_state["counters"]["fit_loop"]
    checkpoint: dict[str, Any] = {
        "epoch": loops["epoch_progress"]["current"]["completed"],
        "global_step": captured.snapshot.version.optimizer_step,
        "pytorch-lightning_version": recipe.lightning_version,
        "state_dict": model_state(recipe, host_state, tensors),
        "loops": {"fit_loop": loops, **recipe.other_loops},
        "callbacks": _callback_states(recipe, host_state, tensors),
        "optimizer_states": [_optimizer_state(recipe, host_state, tensors, i) for i in range(len(recipe.parameters))],
        "lr_schedulers": [scheduler["state"] for scheduler in host_state["schedulers"]],
        **recipe.hyper_parameters,
    }
    if host_state["precision"]:
        checkpoint[recipe.precision_key] = host_state["precision"]
    if recipe.datamodule_key is not None and host_state["datamodule"] and host_state["datamodule"]["state"]:
        checkpoint[recipe.datamodule_key] = host_state["datamodule"]["state"]
    if recipe.averaged is not None:
        _put_average_first(checkpoint, recipe.averaged, tensors)
    return checkpoint


def _callback_states(recipe: Recipe, host_state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    states = [
        callback["state"] | _average_state(tensors)
        if callback["class"] == "StochasticWeightAveraging"
        else callback["state"]
        for callback in host_state["callbacks"]
    ]
    return {key: state for key, state in zip(recipe.callback_keys, states, strict=True) if state}


def _average_state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the averaged model of `StochasticWeightAveraging`, which is part of the tensor state."""
    averaged = re.compile(r".*\.StochasticWeightAveraging\._average_model/(?:parameter|buffer)/(.*)")
    found = {match[1]: tensor for name, tensor in tensors.items() if (match := averaged.fullmatch(name))}
    return {"average_model_state": found}


def _optimizer_state(
    recipe: Recipe, host_state: Mapping[str, Any], tensors: Mapping[str, Tensor], index: int
) -> dict[str, Any]:
    """Build the result of `Optimizer.state_dict`: parameters by number, in the order of their groups."""
    facts = host_state["optimizers"][index]
    numbered = {
        name: number for number, name in enumerate(name for group in recipe.parameters[index] for name in group)
    }
    groups = [
        values | {"params": [numbered[name] for name in names]}
        for values, names in zip(facts["groups"], recipe.parameters[index], strict=True)
    ]
    state: dict[Any, Any] = dict(facts["common"])
    prefix = f"optimizer/{index}/"
    for name, tensor in tensors.items():
        parameter, _, key = name.removeprefix(prefix).rpartition("/")
        if name.startswith(prefix) and parameter in numbered and not (parameter.startswith("#") and key == "value"):
            state.setdefault(numbered[parameter], {})[key] = tensor
    for name, values in facts["state"].items():
        state.setdefault(numbered[name], {}).update(values)
    return {
        "state": dict(sorted(state.items(), key=lambda item: (isinstance(item[0], str), item[0]))),
        "param_groups": groups,
    }


def _put_average_first(checkpoint: dict[str, Any], averaged: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Replace the model with its average and store the model separately, like Lightning's averaging callbacks."""
    inside = "module."
    average = {key: tensors[name] for key, name in averaged.items() if name in tensors}
    model = checkpoint["current_model_state"] = checkpoint["state_dict"]
    averaged_model = {k.removeprefix(inside): v for k, v in average.items() if k.startswith(inside)}
    # Extra state and metrics have no average and stay the model's own.
    checkpoint["state_dict"] = model | averaged_model
    checkpoint["averaging_state"] = {k: v for k, v in average.items() if not k.startswith(inside)}
