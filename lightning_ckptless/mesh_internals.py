"""Every private torch name of sharded models that lightning_ckptless touches; apart, because importing them takes long.

Read at torch 2.13. Each has a test in `tests/test_mesh_internals.py` that fails loudly when a new version moves it.
"""

from __future__ import annotations

import math
from typing import Any

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
