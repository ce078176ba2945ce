"""Between a trainer's large tensors and the layout that cuts them into shards."""

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


def describe_state(index: StateIndex, *, replicated: bool = True, still: Collection[str] = ()) -> tuple[Described, ...]:
    """What this rank holds: the tensors that other ranks may hold too, then its own.

    Args:
        index: where they are.
        replicated: whether those that are neither sharded nor its own are known to be the same on all ranks; else
            their values are compared.
        still: names of those that seem to change seldom.
    """
    tensors, private = index.tensors(), index.private
    shared = describe({name: t for name, t in tensors.items() if name not in private}, replicated=True)
    own = describe({name: t for name, t in tensors.items() if name in private}, replicated=False)
    if not replicated:
        shared = tuple(
            d if d.box or not d.replicated else replace(d, digest=digest_of(tensors[d.name])) for d in shared
        )
    return tuple(replace(d, still=d.name in still) for d in shared + own)


def digest_of(tensor: Tensor) -> str:
    """Digest of the values of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return digest("xxh3", [bytes_of(flat.view(torch.uint8))])


def make_room(trainer: Any, described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Create the tensors of a version that a trainer makes only when it trains, and drop those that it has beyond.

    Args:
        trainer: its strategy is set up; it may not have made a step yet.
        described: dtype and whole shape of every tensor of the version, by name.
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
        layout: of the version.
        bulks: tensor part of each shard: uint8 of shape [bulk bytes].
        rank: this rank.
        optimizers_hold: whether the state of the optimizers is that of the version already: it is left as it is, since
            nothing but a step changes it. Parameters are always copied: a hook may write to them at any time, as
            momentum encoders, averaged weights and clipped weights are kept.
        index: where the trainer's tensors are, if it is known that they are those of the layout.

    Returns:
        Where the trainer's tensors are.

    Raises:
        LayoutMismatchError: the script has built other tensors than those that were mirrored; names them.
    """
    if index is None:
        make_room(trainer, layout.known_to(rank))
        index = StateIndex(trainer)
        layout.require_same(describe_state(index), rank)
    tensors = index.read()
    fill(layout, bulks, tensors, rank, leave=set(filter(is_of_optimizer, tensors)) if optimizers_hold else ())
    return index
