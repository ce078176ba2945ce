"""Every private torch name of sharded models that lightning_ckptless touches; those of other things are elsewhere.

Each has a test in `tests/internals/test_mesh_internals.py` that fails when a new version moves it. Names that differ
between the supported versions are in `mesh_versions`.
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


@contextmanager
def one_by_one() -> Iterator[None]:
    """Have groups made each for itself, not split off the default one as they are where that is bound to a device.

    NCCL ends the process when a communicator that was made behind a fault is split (torch 2.11, NCCL 2.28).
    """
    group = _get_default_group()
    bound, group.bound_device_id = group.bound_device_id, None
    try:
        yield
    finally:
        group.bound_device_id = bound


def become(mesh: DeviceMesh, rebuilt: DeviceMesh) -> bool:
    """Let a mesh, and all that was sliced from it, be as one that was made for another generation.

    Tensors, modules and hooks of tensor parallelism hold meshes, some of them where nobody else can reach: so each has
    to stay the object that it is.

    Args:
        mesh: of the last generation, or made before there was one.
        rebuilt: of as many dimensions, under the same names.

    Returns:
        Whether it has other sizes now, or this rank another place in it.
    """
    has_moved = (mesh.shape, mesh.get_coordinate()) != (rebuilt.shape, rebuilt.get_coordinate())
    # Moved, not copied: a mesh is let go of late, and groups that are held end no thread.
    groups = mesh_versions.take_groups(rebuilt)
    if not has_moved and mesh._dim_group_names == rebuilt._dim_group_names:
        vars(mesh).update(groups)
        return False
    with mesh_versions.changing(mesh) as slices:
        vars(mesh).update(vars(rebuilt) | groups)
        for part in slices:
            vars(part).update(vars(_slice_like(mesh, part)))
    # What is looked up by a mesh does not know that this rank is another one in it.
    mesh_versions.forget_operations()
    _gen_transform_infos.cache_clear()
    return has_moved


def obstacle_to_dividing_anew(modules: Iterable[Any], tensors: Iterable[torch.Tensor], mesh: DeviceMesh) -> str:
    """Why sharded tensors could not be divided over another number of ranks where they are; empty where they can.

    Args:
        modules: those under `fully_shard`.
        tensors: all that are to be divided, and others.
        mesh: the one that they are to be sharded over.
    """
    if names := mesh_versions.flattened(mesh):
        return f"the mesh was flattened, into {', '.join(names)}"
    for group in _groups(modules):
        if group.post_forward_mesh_info not in (None, group.mesh_info):
            return "layers are sharded over fewer ranks after their forward pass (reshard_after_forward is a number)"
        # Since torch 2.12.
        if getattr(group.mesh_info, "is_spmd_mesh", False):
            return "fully_shard was told which dimensions of the mesh are data parallel (dp_mesh_dims)"
        if mesh_versions.root_of(group.mesh_info.mesh) is not mesh:
            return "layers are sharded over another mesh than the strategy's"
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            continue
        # Equal, for torch may have given it a mesh that it remembers.
        if mesh_versions.root_of(tensor.device_mesh) != mesh:
            return "a tensor is sharded over another mesh than the strategy's"
        if type(tensor._local_tensor) is not torch.Tensor:
            return f"a sharded tensor is made of {type(tensor._local_tensor).__name__}"
    return ""


def divide_anew(modules: Iterable[Any]) -> list[Any]:
    """Give every parameter under `fully_shard` room for what this rank holds of it now; its values are lost.

    Args:
        modules: those under `fully_shard`; their mesh is of the new world, and no pass is under way.

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
    """Parameters that `fully_shard` will not divide: name, sizes, dimension along which they are sharded, and ranks.

    Args:
        modules: those under `fully_shard`; their mesh is of the new world.
    """
    return [
        (parameter._param_fqn, list(parameter._orig_size), dim, ranks)
        for group in _groups(modules)
        for parameter in group.fsdp_params
        if (dim := parameter.fsdp_placement.dim) > 0
        and parameter._orig_size[dim] % (ranks := parameter.mesh_info.mesh.size(-1))
    ]


def _divide_parameter(parameter: Any) -> None:
    """What torch does when a module comes under `fully_shard`, but for a parameter that others know already."""
    known, spec = parameter.sharded_param, mesh_versions.spec_before_sharding(parameter)
    # A number that torch 2.12 and later look a parameter up by.
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
    # Of the size that all parts had together.
    parameter.all_gather_outputs = []
    vars(parameter).pop("_unsharded_param", None)


def make_room_for_part(tensor: DTensor, mesh: DeviceMesh) -> None:
    """Give a sharded tensor room for what this rank holds of it now; its values are lost.

    Args:
        tensor: sharded over some dimensions of the mesh.
        mesh: of the new world.
    """
    # Torch remembers what an operation makes, with a mesh that was equal once: that of an earlier fit it may be.
    over = _slice_like(mesh, tensor.device_mesh)
    sizes, _ = compute_local_shape_and_global_offset(tensor.shape, over, tensor.placements)
    tensor._local_tensor = tensor._local_tensor.new_zeros(sizes)
    tensor._spec = DTensorSpec(over, tensor.placements, tensor_meta=tensor._spec.tensor_meta)


def _slice_like(mesh: DeviceMesh, part: DeviceMesh) -> DeviceMesh:
    """The dimensions of a mesh that another one has."""
    names = part.mesh_dim_names
    assert names is not None
    return mesh_versions.slice_of(mesh, names)


def _groups(modules: Iterable[Any]) -> Iterator[Any]:
    for module in modules:
        yield from mesh_versions.parameter_groups(module._get_fsdp_state())


def forget_iteration(modules: Iterable[Any]) -> None:
    """Let modules under `fully_shard` forget a pass that was cut off, and look up their groups anew.

    Args:
        modules: all of a model; those that were never used have nothing to forget.
    """
    states = [(module, module._get_fsdp_state()) for module in modules]
    for _, state in states:
        for group in mesh_versions.parameter_groups(state):
            # It would be waited for, and comes no more: its connections are cut.
            group._all_gather_result = None
    for module, state in states:
        if state._is_root:
            mesh_versions.reset_iteration(module)
    for _, state in states:
        for group in mesh_versions.parameter_groups(state):
            for info in (group.mesh_info, group.post_forward_mesh_info):
                if info is not None:
                    info.__post_init__()
