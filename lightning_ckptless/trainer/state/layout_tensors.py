"""Connects a trainer's large tensors with the layout that divides them into shards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_ckptless.replica.checksum import bytes_of, digest
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.layout.tensor_spec import Described, describe
from lightning_ckptless.replica.restore import fill
from lightning_ckptless.trainer.state.tensors import (
    StateIndex,
    is_of_optimizer,
    make_room_for_buffers,
    make_room_for_optimizer_state,
)


def describe_state(
    index: StateIndex, *, replicated: bool = True, static: Collection[str] = ()
) -> tuple[Described, ...]:
    """Describe the tensors of this rank: first those that other ranks may hold too, then its private ones.

    Args:
        index: locates the tensors.
        replicated: whether tensors that are neither sharded nor private are known to be equal on all ranks. If not,
            their values are compared by digest.
        static: names of the tensors that appear to be static.
    """
    tensors, private = index.tensors(), index.private
    shared = describe({name: t for name, t in tensors.items() if name not in private}, replicated=True)
    own = describe({name: t for name, t in tensors.items() if name in private}, replicated=False)
    if not replicated:
        shared = tuple(
            d if d.box or not d.replicated else replace(d, digest=_compared(tensors[d.name])) for d in shared
        )
    return tuple(replace(d, static=True) if d.name in static else d for d in shared + own)


def digest_of(tensor: Tensor) -> str:
    """Return a digest of a tensor's values."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return digest("xxh3", [bytes_of(flat.view(torch.uint8))])


def _compared(tensor: Tensor) -> str:
    """Return what differs if ranks have different values: on a device, sums of the bits, without a copy to the host."""
    if tensor.device.type == "cpu":
        return digest_of(tensor)
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return "+".join(str(int(part.sum(dtype=torch.int64))) for part in (flat, flat[::3], flat[::7]))


def make_room(trainer: Any, described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Create tensors of a version that the trainer creates only in training, and drop tensors not in the version.

    Args:
        trainer: its strategy is set up; it may not have made a step yet.
        described: dtype and global shape of every tensor of the version, by name.
    """
    StateIndex(trainer).keep_only(dict(described))
    make_room_for_buffers(trainer, dict(described))
    make_room_for_optimizer_state(
        trainer, {name: facts for name, facts in described.items() if name.startswith("optimizer/")}
    )


def fill_trainer(
    trainer: Any,
    layout: Layout,
    bulks: Mapping[int, Tensor],
    *,
    rank: int,
    optimizers_hold: bool = False,
    index: StateIndex | None = None,
) -> StateIndex:
    """Copy a version into the tensors of a trainer, whose optimizers may not have made a step yet.

    Args:
        trainer: its strategy is set up.
        layout: layout of the version.
        bulks: tensor part of each shard: uint8 of shape [bulk bytes].
        rank: this rank.
        optimizers_hold: whether the optimizer state is already that of the version. It is then not copied, since only
            a step changes it. Parameters are always copied: a hook may write to them at any time (momentum encoders,
            weight averaging, weight clipping).
        index: locates the trainer's tensors, if they are known to match the layout.

    Returns:
        The index of the trainer's tensors.

    Raises:
        LayoutMismatchError: the script built different tensors than those mirrored; names them.
    """
    if index is None:
        make_room(trainer, layout.known_to(rank))
        index = StateIndex(trainer)
        layout.require_same(describe_state(index), rank)
    tensors = index.read()
    fill(layout, bulks, tensors, rank, leave=set(filter(is_of_optimizer, tensors)) if optimizers_hold else ())
    return index
