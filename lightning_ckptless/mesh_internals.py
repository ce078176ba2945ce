"""Every private torch name of sharded models that lightning_ckptless touches; those of other things are elsewhere.

Read at torch 2.13. Each has a test in `tests/test_mesh_internals.py` that fails loudly when a new version moves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _world
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard


def shard_box(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Corner and sizes of the box that this rank holds of a sharded tensor; None where what it holds is no box of it.

    Two dimensions of a mesh that shard the same dimension of a tensor in an order other than their own leave rows that
    lie apart, unless they divide it evenly.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(isinstance(placement, Partial) for placement in placements):
        return None
    for place, strided in enumerate(placements):
        if isinstance(strided, _StridedShard):
            later = [d for d in range(place + 1, mesh.ndim) if _shards(placements[d], strided.dim)]
            every = [d for d in range(mesh.ndim) if _shards(placements[d], strided.dim)]
            if math.prod(map(mesh.size, later)) != strided.split_factor:
                return None
            if tensor.shape[strided.dim] % math.prod(map(mesh.size, every)):
                return None
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return tuple(offsets), tuple(sizes)


def _shards(placement: Any, dim: int) -> bool:
    """Whether a placement shards one dimension of a tensor."""
    return isinstance(placement, Shard | _StridedShard) and placement.dim == dim


def number_groups_from(first: int) -> None:
    """Let the next process group that is made have this number for its name, or a later one.

    A mesh finds its groups by their names, each time that it uses them: groups that are made anew under the same names
    are its groups.
    """
    _world.group_count = max(_world.group_count, first)


def use_groups_of(mesh: DeviceMesh, anew: DeviceMesh) -> None:
    """Let a mesh, and all that was sliced from it, use the groups of one that was made like it in another generation.

    Raises:
        RuntimeError: the groups have other names.
    """
    if mesh._dim_group_names != anew._dim_group_names:
        raise RuntimeError(f"groups {anew._dim_group_names} in the place of {mesh._dim_group_names}")
    # Moved, not copied: a mesh is let go of late, and groups that are held end no thread.
    mesh._pg_registry, anew._pg_registry = anew._pg_registry, {}


def forget_iteration(modules: Iterable[Any]) -> None:
    """Let modules under `fully_shard` forget a pass that was cut off, and look up their groups anew.

    Args:
        modules: all of a model; those that were never used have nothing to forget.
    """
    states = [(module, module._get_fsdp_state()) for module in modules]
    for _, state in states:
        for group in state._fsdp_param_groups:
            # It would be waited for, and comes no more: its connections are cut.
            group._all_gather_result = None
    for module, state in states:
        if state._is_root:
            module.reset_iter_state()
    for _, state in states:
        for group in state._fsdp_param_groups:
            for info in (group.mesh_info, group.post_forward_mesh_info):
                if info is not None:
                    info.__post_init__()
