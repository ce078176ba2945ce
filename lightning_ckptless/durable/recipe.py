"""The recipe for a Lightning checkpoint: the constant data that a version itself does not contain.

A version contains tensors by our names and the host state of each rank. A checkpoint file uses other names, and has
hyper-parameters, callback keys and so on. These are written once, next to the layout in the arena, and copied to
every durable state.
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
FORMAT = 2
_KIND = "recipe"


@dataclass(frozen=True)
class Recipe:
    """The data that a checkpoint needs in addition to a version.

    Args:
        lightning_version: version of Lightning that trains.
        state_dict: our name of each tensor by its name in the model's `state_dict`.
        extra_state: module path by the `state_dict` name of its extra state.
        metric_state: metric path and attribute by the `state_dict` name of a persistent metric state.
        parameters: names of the parameters, by optimizer and group.
        callback_keys: state keys of the callbacks, in the order of the host state.
        precision_key: key of the precision plugin's state.
        datamodule_key: key of the datamodule's state; None without one.
        hyper_parameters: entries of the checkpoint for hyper-parameters.
        other_loops: state of the loops other than the fit loop.
        averaged: our name of each tensor by its name in the `state_dict` of an averaging callback, whose average
            replaces the model in a checkpoint; None without one.
        lacking: names in the `state_dict` that a version does not contain.
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
    """Write a recipe to an arena.

    Args:
        arena: folder of the arena.
        pickled: the packed recipe.

    Raises:
        ArenaError: the file cannot be written.
    """
    replace_file(arena / NAME, seal_recipe(pickled))


def seal_recipe(pickled: bytes) -> bytes:
    """Seal a packed recipe."""
    return seal(_KIND, FORMAT, {"pickled": base64.b64encode(pickled).decode()})


def read_recipe(folder: Path) -> bytes:
    """Read the sealed recipe of an arena or a durable state; empty if there is none."""
    try:
        return (folder / NAME).read_bytes()
    except FileNotFoundError:
        return b""


def unseal_recipe(data: bytes) -> bytes:
    """Unseal the result of `read_recipe`.

    Raises:
        DurableError: the recipe is damaged.
    """
    try:
        pickled: bytes = base64.b64decode(unseal(data, _KIND, FORMAT, _SCHEMA)["pickled"])
    except ValueError as error:
        raise DurableError(f"{NAME}: {error}: use format dcp, which exports the tensors only") from error
    return pickled


def has_recipe(arena: Path) -> bool:
    """Return whether an arena has an intact recipe."""
    try:
        return bool(unseal_recipe(read_recipe(arena)))
    except DurableError:
        return False


_SCHEMA = record(pickled=text(r"[A-Za-z0-9+/]+={0,2}", longest=LONGEST_BYTES))
