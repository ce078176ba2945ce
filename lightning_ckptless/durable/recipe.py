"""How a Lightning checkpoint is put together from a version: what the version does not say, as it never changes.

A version holds tensors by our names and the host state of each rank. A checkpoint file has other names for them, and
hyper-parameters, keys of callbacks and the like. They are written down once, beside the layout in the arena, and travel
with every durable state.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ckptless.errors import DurableError
from lightning_ckptless.formats.schema import record, text
from lightning_ckptless.formats.sealed import LONGEST_BYTES, seal, unseal
from lightning_ckptless.replica.arena_metadata import replace_file

NAME = "recipe.json"
FORMAT = 1
_KIND = "recipe"


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint needs beyond a version.

    Args:
        lightning_version: of the Lightning that trains.
        state_dict: our name of each tensor by its name in the model's `state_dict`.
        extra_state: names in the `state_dict` of extra state, with the path of their module.
        metric_state: names in the `state_dict` of persistent metric states, with path and attribute of the metric.
        parameters: for each optimizer and each of its groups, the names of its parameters.
        callback_keys: state keys of the callbacks, in the order of the host state.
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


def write_recipe(arena: Path, pickled: bytes) -> None:
    """Keep a recipe in an arena.

    Args:
        arena: folder of the arena.
        pickled: the recipe, packed.

    Raises:
        ArenaError: it cannot be written.
    """
    replace_file(arena / NAME, seal_recipe(pickled))


def seal_recipe(pickled: bytes) -> bytes:
    """A packed recipe as it is written down."""
    return seal(_KIND, FORMAT, {"pickled": base64.b64encode(pickled).decode()})


def read_recipe(folder: Path) -> bytes:
    """The recipe in the folder of an arena or of a durable state, sealed; empty where there is none."""
    try:
        return (folder / NAME).read_bytes()
    except FileNotFoundError:
        return b""


def unseal_recipe(data: bytes) -> bytes:
    """The packed recipe in what `read_recipe` has read.

    Raises:
        DurableError: it is damaged.
    """
    try:
        pickled: bytes = base64.b64decode(unseal(data, _KIND, FORMAT, _SCHEMA)["pickled"])
    except ValueError as error:
        raise DurableError(f"{NAME}: {error}: format dcp takes the tensors as they are") from error
    return pickled


def has_recipe(arena: Path) -> bool:
    """Whether an arena has a recipe that is as it was written."""
    try:
        return bool(unseal_recipe(read_recipe(arena)))
    except DurableError:
        return False


_SCHEMA = record(pickled=text(r"[A-Za-z0-9+/]+={0,2}", longest=LONGEST_BYTES))
