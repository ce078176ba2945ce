"""A sharded model among another number of ranks: each gets room for its new part of every tensor, where it stands.

Parameters stay the objects that optimizers and hooks know. Values are put in from a version: what a rank had held is
no part of what it holds now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.internals.mesh_internals import divide_anew, make_room_for_part, uneven_parameters
from lightning_ckptless.trainer.state.sharding import reshard
from lightning_ckptless.trainer.state.tensors import StateIndex


def divide_state_anew(trainer: Any, modules: Sequence[Any], mesh: DeviceMesh) -> None:
    """Make room for this rank's part of every sharded tensor of the state.

    Args:
        trainer: set up.
        modules: those of its model under `fully_shard`.
        mesh: that of the strategy, which has become the new world's.

    Raises:
        LayoutMismatchError: a tensor cannot be divided over the ranks that there are.
    """
    for name, sizes, dim, ranks in uneven_parameters(modules):
        raise LayoutMismatchError(
            f"rank {trainer.global_rank}: {name} is {sizes}, sharded along its dimension {dim}: {ranks} ranks cannot "
            "divide that evenly, as fully_shard wants it. Allow only numbers of nodes that can (--nnodes MIN:MAX), or "
            "shard along dimension 0"
        )
    reshard(modules)
    divided = set(map(id, divide_anew(modules)))
    for tensor in StateIndex(trainer).tensors().values():
        if isinstance(tensor, DTensor) and id(tensor) not in divided:
            make_room_for_part(tensor, mesh)
