"""How a Lightning checkpoint is put together from a version: what the version does not say, as it never changes.

A version holds tensors by our names and the small state of each rank. A checkpoint file has other names for them, and
hyper-parameters, keys of callbacks and the like. They are written down once, beside the layout in the arena, and travel
with every durable state.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ckptless.replica.facts import replace_file

NAME = "recipe.bin"


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint needs beyond a version.

    Args:
        lightning_version: of the Lightning that trains.
        state_dict: our name of each tensor by its name in the model's `state_dict`.
        extra_state: names in the `state_dict` of extra state, with the path of their module.
        metric_state: names in the `state_dict` of persistent metric states, with path and attribute of the metric.
        parameters: for each optimizer and each of its groups, the names of its parameters.
        callback_keys: state keys of the callbacks, in the order of the small state.
        precision_key: under which the precision plugin's state is filed.
        datamodule_key: under which the datamodule's state is filed; None without one.
        hyper_parameters: what a checkpoint says of hyper-parameters, keys and all.
        other_loops: state of the loops other than fit's.
        averaged: our name of each tensor by its name in the `state_dict` of the average that a callback keeps, and that
            a checkpoint has in the place of the model; None where none does.
        lacking: names in the `state_dict` that a version does not hold.
    """

    lightning_version: str
    state_dict: dict[str, str]
    extra_state: dict[str, str]
    metric_state: dict[str, tuple[str, str]]
    parameters: list[list[list[str]]]
    callback_keys: list[str]
    precision_key: str
    datamodule_key: str | None
    hyper_parameters: dict[str, Any]
    other_loops: dict[str, Any]
    averaged: dict[str, str] | None
    lacking: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """The recipe, pickled."""
        return pickle.dumps(self, protocol=pickle.HIGHEST_PROTOCOL)


def write_recipe(arena: Path, recipe: Recipe) -> None:
    """Keep a recipe in an arena.

    Raises:
        ArenaError: it cannot be written.
    """
    replace_file(arena / NAME, recipe.to_bytes())


def read_recipe(folder: Path) -> bytes:
    """The recipe in the folder of an arena or of a durable state; empty where there is none."""
    try:
        return (folder / NAME).read_bytes()
    except FileNotFoundError:
        return b""
