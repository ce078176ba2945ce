"""All uses of private torch names for sharded models; other private names of torch are in `torch_internals`.

Each has a test in `tests/internals/test_mesh_internals.py` that fails if a new version lacks the name. Names that
differ between the supported versions are in `mesh_versions`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_group, _world
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_ckptless.internals import mesh_versions


def shard_box(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return offsets and sizes of this rank's part of a sharded tensor; None if the part is not a contiguous box.

    If two mesh dimensions shard the same tensor dimension in reverse order, the rows of a rank are not contiguous
    unless the sizes divide evenly.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(isinstance(placement, Partial) for placement in placements):
        return None
    for index, strided in enumerate(placements):
        if isinstance(strided, _StridedShard):
            later = [d for d in range(index + 1, mesh.ndim) if _shards(placements[d], strided.dim)]
            every = [d for d in range(mesh.ndim) if _shards(placements[d], strided.dim)]
            if math.prod(map(mesh.size, later)) != strided.split_factor:
                return None
            if tensor.shape[strided.dim] % math.prod(map(mesh.size, every)):
                return None
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return tuple(offsets), tuple(sizes)


def _shards(placement: Any, dim: int) -> bool:
    """Return whether a placement shards this dimension of a tensor."""
    return isinstance(placement, Shard | _StridedShard) and placement.dim == dim


def number_groups_from(first: int) -> None:
    """Make torch number the next process groups from this number or a higher one.

    A mesh looks up its groups by name at each use, so groups that are re-created under the same names become its
    groups.
    """
    _world.group_count = max(_world.group_count, first)


@contextmanager
def one_by_one() -> Iterator[None]:
    """Create groups independently instead of splitting a default group that is bound to a device.

    NCCL ends the process if a communicator that was created after a fault is split (torch 2.11, NCCL 2.28).
    """
    group = _get_default_group()
    bound, group.bound_device_id = group.bound_device_id, None
    try:
        yield
    finally:
        group.bound_device_id = bound


def become(mesh: DeviceMesh, rebuilt: DeviceMesh) -> bool:
    """Update a mesh and its slices in place to match one that was created for a new generation.

    Tensors, modules and hooks of tensor parallelism refer to meshes, some from places that cannot be reached, so the
    mesh objects must stay the same.

    Args:
        mesh: mesh of the last generation, or from before the first.
        rebuilt: new mesh with the same dimension names.

    Returns:
        Whether its sizes or the coordinates of this rank have changed.
    """
    has_moved = (mesh.shape, mesh.get_coordinate()) != (rebuilt.shape, rebuilt.get_coordinate())
    # Moved, not copied: the new mesh may be freed late, and the threads of its groups run as long as it refers to them.
    groups = mesh_versions.take_groups(rebuilt)
    if not has_moved and mesh._dim_group_names == rebuilt._dim_group_names:
        vars(mesh).update(groups)
        return False
    with mesh_versions.changing(mesh) as slices:
        vars(mesh).update(vars(rebuilt) | groups)
        for part in slices:
            vars(part).update(vars(_slice_like(mesh, part)))
    # These caches use a mesh as the key and do not depend on the coordinates of this rank.
    mesh_versions.forget_operations()
    _gen_transform_infos.cache_clear()
    return has_moved


def obstacle_to_resharding(modules: Iterable[Any], tensors: Iterable[torch.Tensor], mesh: DeviceMesh) -> str:
    """Return why sharded tensors cannot be resharded in place over another number of ranks; empty if they can.

    Args:
        modules: modules under `fully_shard`.
        tensors: all tensors of the state, sharded or not.
        mesh: mesh of the strategy.
    """
    if names := mesh_versions.flattened(mesh):
        return f"the mesh was flattened, into {', '.join(names)}"
    for group in _groups(modules):
        if group.post_forward_mesh_info not in (None, group.mesh_info):
            return "layers are sharded over fewer ranks after their forward pass (reshard_after_forward is a number)"
        # Since torch 2.12.
        if getattr(group.mesh_info, "is_spmd_mesh", False):
            return "fully_shard was called with dp_mesh_dims"
        if mesh_versions.root_of(group.mesh_info.mesh) is not mesh:
            return "layers are sharded over another mesh than the strategy's"
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            continue
        # Compared by equality, as torch may have used an equal mesh from a cache.
        if mesh_versions.root_of(tensor.device_mesh) != mesh:
            return "a tensor is sharded over another mesh than the strategy's"
        if type(tensor._local_tensor) is not torch.Tensor:
            return f"the local part of a sharded tensor is a {type(tensor._local_tensor).__name__}"
    return ""


def reshard_in_place(modules: Iterable[Any]) -> list[Any]:
    """Resize every parameter under `fully_shard` to this rank's part in the new world; values are lost.

    Args:
        modules: modules under `fully_shard`, with the mesh of the new world and no pass in progress.

    Returns:
        The parameters.
    """
    divided = []
    for group in _groups(modules):
        for parameter in group.fsdp_params:
            _divide_parameter(parameter)
            divided.append(parameter.sharded_param)
    return divided


def uneven_parameters(modules: Iterable[Any]) -> list[tuple[str, list[int], int, int]]:
    """Return the parameters that `fully_shard` cannot divide: name, sizes, sharded dimension, and number of ranks.

    Args:
        modules: modules under `fully_shard`, with the mesh of the new world.
    """
    return [
        (parameter._param_fqn, list(parameter._orig_size), dim, ranks)
        for group in _groups(modules)
        for parameter in group.fsdp_params
        if (dim := parameter.fsdp_placement.dim) > 0
        and parameter._orig_size[dim] % (ranks := parameter.mesh_info.mesh.size(-1))
    ]


def _divide_parameter(parameter: Any) -> None:
    """Repeat what `fully_shard` does for a parameter, but keep the parameter object, to which others refer."""
    known, spec = parameter.sharded_param, mesh_versions.spec_before_sharding(parameter)
    # A number by which torch 2.12 and later look up a parameter.
    number = {name: value for name, value in vars(parameter).items() if name == "_orig_param_uid"}
    whole = torch.empty(parameter._orig_size, dtype=known.dtype, device=parameter.device)
    if spec is not None:
        over = _slice_like(mesh_versions.root_of(parameter.mesh_info.mesh), spec.mesh)
        spec = DTensorSpec(over, spec.placements, tensor_meta=spec.tensor_meta)
        whole = DTensor(whole, spec, requires_grad=False)  # type: ignore[no-untyped-call]
    mesh_versions.shard(parameter, nn.Parameter(whole, requires_grad=known.requires_grad))
    divided = parameter.sharded_param
    known._local_tensor, known._spec = divided._local_tensor, divided._spec
    parameter.sharded_param = known
    vars(parameter).update(number)
    parameter._setattr_on_modules(known)
    # These buffers have the size of the old world.
    parameter.all_gather_outputs = []
    vars(parameter).pop("_unsharded_param", None)


def make_room_for_part(tensor: DTensor, mesh: DeviceMesh) -> None:
    """Resize a sharded tensor to this rank's part in the new world; values are lost.

    Args:
        tensor: tensor that is sharded over some dimensions of the mesh.
        mesh: mesh of the new world.
    """
    # Torch caches the results of operations by equal meshes, so this may be a mesh from an earlier fit.
    over = _slice_like(mesh, tensor.device_mesh)
    sizes, _ = compute_local_shape_and_global_offset(tensor.shape, over, tensor.placements)
    tensor._local_tensor = tensor._local_tensor.new_zeros(sizes)
    tensor._spec = DTensorSpec(over, tensor.placements, tensor_meta=tensor._spec.tensor_meta)


def _slice_like(mesh: DeviceMesh, part: DeviceMesh) -> DeviceMesh:
    """Return the dimensions of a mesh that another one has."""
    names = part.mesh_dim_names
    assert names is not None
    return mesh_versions.slice_of(mesh, names)


def _groups(modules: Iterable[Any]) -> Iterator[Any]:
    for module in modules:
        yield from mesh_versions.parameter_groups(module._get_fsdp_state())


def forget_iteration(modules: Iterable[Any]) -> None:
    """Reset modules under `fully_shard` after an interrupted pass, and make them look up their groups again.

    Args:
        modules: all such modules of a model, used or not.
    """
    states = [(module, module._get_fsdp_state()) for module in modules]
    for _, state in states:
        for group in mesh_versions.parameter_groups(state):
            # Waiting for it would hang, as the group was aborted.
            group._all_gather_result = None
    for module, state in states:
        if state._is_root:
            mesh_versions.reset_iteration(module)
    for _, state in states:
        for group in mesh_versions.parameter_groups(state):
            for info in (group.mesh_info, group.post_forward_mesh_info):
                if info is not None:
                    info.__post_init__()
