"""Between a trainer's big tensors and the layout that cuts them into shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_ckptless.replica.layout import Described, Layout, describe, dtype_of, plan_layout, private_name
from lightning_ckptless.replica.restore import fill
from lightning_ckptless.trainer.state import (
    StateIndex,
    make_room_for_buffers,
    make_room_for_optimizer_state,
)


def describe_state(index: StateIndex) -> tuple[Described, ...]:
    """What this rank holds: the tensors that all ranks share, then its own."""
    tensors, private = index.read(), index.private
    shared = describe({name: t for name, t in tensors.items() if name not in private}, replicated=True)
    return shared + describe({name: t for name, t in tensors.items() if name in private}, replicated=False)


def fill_trainer(
    trainer: Any,
    layout: Layout,
    bulks: Mapping[int, Tensor],
    *,
    rank: int,
    world_size: int,
    only_own: bool = False,
    index: StateIndex | None = None,
) -> StateIndex:
    """Copy a version into the tensors of a trainer, whose optimizers may not have made a step yet.

    Args:
        trainer: its strategy is set up.
        layout: of the version.
        bulks: tensor part of each shard: uint8 of shape [bulk bytes].
        rank: this rank.
        world_size: number of ranks.
        only_own: copy this rank's own tensors alone: those that all ranks share hold the version already.
        index: where the trainer's tensors are, if it is known that they are those of the layout.

    Returns:
        Where the trainer's tensors are.

    Raises:
        LayoutMismatchError: the script has built other tensors than those that were mirrored; names them.
    """
    if index is not None:
        fill(layout, {rank: bulks[rank]} if only_own else bulks, index.read(), rank)
        return index
    described = {name: (dtype_of(dtype), shape) for name, (dtype, shape) in layout.tensors().items()}
    own = private_name(rank, "")
    of_buffers = {name.removeprefix(own): facts for name, facts in described.items() if name.startswith(own)}
    of_optimizers = {name: facts for name, facts in described.items() if name.startswith("optimizer/")}
    StateIndex(trainer).keep_only({name.removeprefix(own) for name in described})
    make_room_for_buffers(trainer, of_buffers)
    make_room_for_optimizer_state(trainer, of_optimizers)
    index = StateIndex(trainer)
    layout.require_same(plan_layout([describe_state(index)] * world_size), rank)
    fill(layout, {rank: bulks[rank]} if only_own else bulks, index.read(), rank)
    return index
