"""What a rank holds of the state, without its values: names, kinds, and which box of the whole is here.

A tensor that is sharded (a `DTensor`) lies in pieces on several ranks. What a rank has of it is a box: a corner and
sizes. Ranks with the same box hold the same values, and one copy of them is enough.
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
from lightning_ckptless.formats.schema import SchemaError, boolean, optional, record, sequence, text
from lightning_ckptless.formats.sealed import parse
from lightning_ckptless.internals.mesh_internals import shard_box
from lightning_ckptless.replica.slot_stamp import BYTES, CHECKSUM


class Box(NamedTuple):
    """A part of a tensor.

    Args:
        offsets: its corner.
        sizes: its sizes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Held(NamedTuple):
    """What a rank has of a tensor.

    Args:
        dtype: such as `torch.float32`.
        shape: sizes of the whole tensor.
        box: the part that is here.
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
        dtype: such as `torch.float32`.
        shape: sizes of the whole tensor.
        replicated: whether every rank with the same box of it holds the same values; else they are this rank's own.
        box: the part that this rank holds; None for all of it.
        digest: of the values, where only they can tell whether ranks hold the same; empty where it is known.
        still: whether it seems to change seldom. That decides its place in a shard, and nothing else.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    replicated: bool
    box: Box | None = None
    digest: str = ""
    still: bool = field(default=False, compare=False)

    @property
    def held(self) -> Held:
        """What is here."""
        return Held(self.dtype, self.shape, self.box or whole(self.shape))


def to_message(described: Sequence[Described]) -> bytes:
    """A description on its way to the other ranks."""
    return json.dumps([vars(each) for each in described]).encode()


def from_message(data: bytes) -> tuple[Described, ...]:
    """What `to_message` made.

    Raises:
        TransportError: a peer sent something else.
    """
    try:
        described: tuple[Described, ...] = _DESCRIBED(parse(data), "")
    except SchemaError as error:
        raise TransportError(f"a peer sent a description of its state that cannot be read: {error}") from error
    return described


_SIZES = sequence(BYTES, most=64)
_DESCRIBED = sequence(record(
    Described, name=text(), dtype=text(r"torch\.\w+"), shape=_SIZES, replicated=boolean,
    box=optional(lambda value, place: Box(*sequence(_SIZES, length=2)(value, place))), digest=CHECKSUM, still=boolean,
))  # fmt: skip


def whole(shape: tuple[int, ...]) -> Box:
    """The box that is all of a tensor."""
    return Box((0,) * len(shape), shape)


def describe(tensors: Mapping[str, torch.Tensor], *, replicated: bool) -> tuple[Described, ...]:
    """What a set of tensors is like.

    Args:
        tensors: by fully qualified name.
        replicated: whether ranks with the same box of one hold the same values.

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
        # In rows that do not lie side by side, or summed up only when it is read: what is here is this rank's own.
        return Described(name, str(tensor.dtype), tuple(local.shape), replicated=False)
    return Described(name, str(tensor.dtype), tuple(tensor.shape), replicated, Box(*box))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: the tensor itself where it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def is_empty_part(described: Described) -> bool:
    """Whether this rank holds nothing of a tensor that others hold something of."""
    return described.box is not None and math.prod(described.box.sizes) == 0 != math.prod(described.shape)


def differences(expected: Mapping[str, Held], found: Mapping[str, Held], limit: int = 5) -> list[str]:
    """Sentences that name the tensors in which two states differ.

    Args:
        expected: the mirrored state, by name.
        found: the state at hand.
        limit: number of tensors to name; the rest is counted.
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
    """What a rank holds of each tensor, without those of which it holds nothing."""
    return {d.name: d.held for d in described if not is_empty_part(d)}
