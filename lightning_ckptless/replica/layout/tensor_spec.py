"""Descriptions of a rank's tensors without their values: name, dtype, shape, and the part that the rank has.

A sharded tensor (a `DTensor`) is distributed over several ranks. The part on a rank is a box, defined by offsets and
sizes. Ranks with the same box have the same values, so one copy of them is enough.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from lightning_ckptless.errors import OptionsError, TransportError
from lightning_ckptless.formats.schema import BYTES, SchemaError, boolean, optional, record, sequence, text
from lightning_ckptless.formats.sealed import parse
from lightning_ckptless.internals.mesh_internals import shard_box
from lightning_ckptless.replica.slot_stamp import CHECKSUM


class Box(NamedTuple):
    """A part of a tensor.

    Args:
        offsets: start of the box in each dimension.
        sizes: size of the box in each dimension.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Held(NamedTuple):
    """The part of a tensor that a rank has.

    Args:
        dtype: e.g. `torch.float32`.
        shape: shape of the whole tensor.
        box: the local part.
    """

    dtype: str
    shape: tuple[int, ...]
    box: Box

    def __str__(self) -> str:
        whole = f"{self.dtype.removeprefix('torch.')}{list(self.shape)}"
        if self.box.sizes == self.shape:
            return whole
        return f"{list(self.box.sizes)} from {list(self.box.offsets)} of {whole}"


@dataclass(frozen=True)
class Described:
    """One tensor of the state, without its values.

    Args:
        name: fully qualified name.
        dtype: e.g. `torch.float32`.
        shape: shape of the whole tensor.
        replicated: whether all ranks with the same box have the same values; otherwise the values are private.
        box: the part that this rank has; None for all of it.
        digest: digest of the values if only they can show whether ranks have the same; empty if that is known.
        static: whether the tensor is expected to be static. This determines only its place in a shard.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    replicated: bool
    box: Box | None = None
    digest: str = ""
    static: bool = field(default=False, compare=False)

    @property
    def held(self) -> Held:
        """The local part."""
        return Held(self.dtype, self.shape, self.box or whole(self.shape))


def to_message(described: Sequence[Described]) -> bytes:
    """Serialize a description for the other ranks."""
    return json.dumps([vars(each) for each in described]).encode()


def from_message(data: bytes) -> tuple[Described, ...]:
    """Parse the result of `to_message`.

    Raises:
        TransportError: a peer sent invalid data.
    """
    try:
        described: tuple[Described, ...] = _DESCRIBED(parse(data), "")
    except SchemaError as error:
        raise TransportError(f"a peer sent an invalid description of its state: {error}") from error
    return described


SIZES = sequence(BYTES, most=64)
_DESCRIBED = sequence(record(
    Described, name=text(), dtype=text(r"torch\.\w+"), shape=SIZES, replicated=boolean,
    box=optional(lambda value, path: Box(*sequence(SIZES, length=2)(value, path))), digest=CHECKSUM, static=boolean,
))  # fmt: skip


def whole(shape: tuple[int, ...]) -> Box:
    """The box that covers a whole tensor."""
    return Box((0,) * len(shape), shape)


def describe(tensors: Mapping[str, torch.Tensor], *, replicated: bool) -> tuple[Described, ...]:
    """Describe tensors.

    Args:
        tensors: tensors by fully qualified name.
        replicated: whether ranks with the same box of a tensor have the same values.

    Raises:
        OptionsError: a tensor is not dense.
    """
    return tuple(_describe(name, tensor, replicated) for name, tensor in tensors.items())


def _describe(name: str, tensor: torch.Tensor, replicated: bool) -> Described:
    local = local_part(tensor)
    if local.layout is not torch.strided:
        raise OptionsError(f"{name}: a tensor of layout {local.layout} cannot be mirrored, expected torch.strided")
    if not isinstance(tensor, DTensor):
        return Described(name, str(tensor.dtype), tuple(tensor.shape), replicated)
    box = shard_box(tensor)
    if box is None or not replicated:
        # Interleaved rows, or partial values that are summed when read: the local part is private to this rank.
        return Described(name, str(tensor.dtype), tuple(local.shape), replicated=False)
    return Described(name, str(tensor.dtype), tuple(tensor.shape), replicated, Box(*box))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The local part of a tensor; the tensor itself if it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def is_empty_part(described: Described) -> bool:
    """Whether this rank has no part of a non-empty tensor."""
    return described.box is not None and math.prod(described.box.sizes) == 0 != math.prod(described.shape)


def differences(expected: Mapping[str, Held], found: Mapping[str, Held], limit: int = 5) -> list[str]:
    """Describe the tensors in which two states differ.

    Args:
        expected: the mirrored state, by name.
        found: the current state, by name.
        limit: number of tensors to name; the rest are counted.
    """
    sentences = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            sentences.append(f"{name} is missing, expected {expected[name]}")
        elif name not in expected:
            sentences.append(f"{name} is new, {found[name]}")
        elif expected[name] != found[name]:
            sentences.append(f"{name} is {found[name]}, expected {expected[name]}")
    if len(sentences) > limit:
        sentences[limit:] = [f"and {len(sentences) - limit} more"]
    return sentences


def held_by_name(described: Sequence[Described]) -> dict[str, Held]:
    """The part of each tensor that a rank has, by name, without empty parts."""
    return {d.name: d.held for d in described if not is_empty_part(d)}
