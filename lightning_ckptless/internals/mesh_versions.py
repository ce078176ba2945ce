"""Variants for different versions of torch in sharded models, with the versions in their names.

`mesh_internals` uses the names without a version. A variant is selected by feature, not by version number, since builds
between two releases (`2.8.0a0`, as in some container images) have a part of the next release.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor

from lightning_ckptless.internals.names import has

# ---------------------------------------------------------------------- fully_shard


def _parameter_groups_since_2_12(state: Any) -> list[Any]:
    return list(state._fsdp_param_groups)


def _parameter_groups_until_2_11(state: Any) -> list[Any]:
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


parameter_groups = (
    _parameter_groups_since_2_12 if has(FSDPState, "_fsdp_param_groups") else _parameter_groups_until_2_11
)
"""Return the groups of parameters of a module under `fully_shard` that are gathered together."""


def _spec_before_sharding_since_2_12(parameter: Any) -> Any:
    return parameter._unsharded_dtensor_spec


def _spec_before_sharding_until_2_11(parameter: Any) -> Any:
    return parameter._tp_spec if parameter.is_dtensor else None


def _shard_since_2_12(parameter: Any, whole: Any) -> None:
    placement = parameter.fsdp_placement
    parameter._init_sharded_param(whole, parameter.device, lambda _: placement, parameter.mesh_info)


def _shard_until_2_11(parameter: Any, whole: Any) -> None:
    placement = parameter.fsdp_placement
    parameter._init_sharded_param(whole, parameter.device, lambda _: placement)


_HAS_SPEC = has(FSDPParam, "_unsharded_dtensor_spec")
spec_before_sharding = _spec_before_sharding_since_2_12 if _HAS_SPEC else _spec_before_sharding_until_2_11
"""Return the distribution of a parameter before `fully_shard`; None if it was a plain tensor."""
shard = (
    _shard_since_2_12
    if "mesh_info" in inspect.signature(FSDPParam._init_sharded_param).parameters
    else _shard_until_2_11
)
"""Shard a parameter like `fully_shard`, along its current dimension."""


def _reset_iteration_since_2_13(module: Any) -> None:
    module.reset_iter_state()


def _reset_iteration_until_2_12(module: Any) -> None:
    root = module._get_fsdp_state()
    shared = root._comm_ctx
    reductions = _reductions(shared)
    _wait_for(root, [shared.all_gather_state, *reductions])
    shared.all_gather_state = None
    if isinstance(reductions, list):
        reductions.clear()
    else:
        shared.reduce_scatter_state = None
    shared.post_forward_order.clear()
    for state in root._state_ctx.all_states:
        state._modules_to_run_forward.clear()
        state._training_state = TrainingState.IDLE
        for group in parameter_groups(state):
            _reset_group_until_2_12(root, group)
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False


def _reductions(shared: Any) -> list[Any] | tuple[Any]:
    """Return the reductions in progress: several since torch 2.12, one before."""
    return shared.reduce_scatter_states if hasattr(shared, "reduce_scatter_states") else (shared.reduce_scatter_state,)


def _reset_group_until_2_12(root: Any, group: Any) -> None:
    stream = root._device_handle.current_stream()
    _wait_for(root, [group._all_reduce_state])
    for event in (group._post_reduce_event, group._reshard_after_forward_event):
        if event is not None:
            stream.wait_event(event)
    group._post_reduce_event = group._all_reduce_state = group._reshard_after_forward_event = None
    group._partial_reduce_output = None
    group._post_forward_indices.clear()
    group._training_state = TrainingState.IDLE
    group._to_sharded()


def _wait_for(root: Any, communications: Iterable[Any]) -> None:
    """Make the current stream, but not the CPU, wait until the memory of collectives in progress is free."""
    for one in communications:
        if one is not None and one.event is not None:
            root._device_handle.current_stream().wait_event(one.event)


reset_iteration = (
    _reset_iteration_since_2_13 if hasattr(FSDPModule, "reset_iter_state") else _reset_iteration_until_2_12
)
"""Reset the root of the modules under `fully_shard` after an interrupted pass; gradients are lost."""


# ---------------------------------------------------------------------- meshes


def _root_of_since_2_10(mesh: DeviceMesh) -> DeviceMesh:
    return mesh._get_root_mesh()


def _root_of_until_2_9(mesh: DeviceMesh) -> DeviceMesh:
    root: DeviceMesh = device_mesh._mesh_resources.get_root_mesh(mesh)
    return root


def _flattened_since_2_10(mesh: DeviceMesh) -> list[str]:
    return list(mesh._flatten_mapping)


def _flattened_until_2_9(mesh: DeviceMesh) -> list[str]:
    return list(device_mesh._mesh_resources.root_to_flatten_mapping.get(mesh, ()))


def _slice_since_2_10(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    return DeviceMesh._concatenate([mesh[name] for name in names])


def _slice_until_2_9(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    return mesh[names]


@contextmanager
def _changing_since_2_10(mesh: DeviceMesh) -> Iterator[list[DeviceMesh]]:
    yield [found for found in _meshes() if found._root_mesh is mesh]


@contextmanager
def _changing_until_2_9(mesh: DeviceMesh) -> Iterator[list[DeviceMesh]]:
    # A table maps slices to the original mesh by equality, so a changed slice would not be found in it.
    roots = device_mesh._mesh_resources.child_to_root_mapping
    slices = [found for found in _meshes() if found is not mesh and roots.get(found) == mesh]
    for part in slices:
        roots.pop(part, None)
    yield slices
    roots.update(dict.fromkeys(slices, mesh))


def _meshes() -> list[DeviceMesh]:
    return [found for found in gc.get_objects() if type(found) is DeviceMesh]


_KNOWS_ROOT = hasattr(DeviceMesh, "_get_root_mesh")
root_of = _root_of_since_2_10 if _KNOWS_ROOT else _root_of_until_2_9
"""Return the mesh that a mesh was sliced from, or the mesh itself."""
flattened = _flattened_since_2_10 if _KNOWS_ROOT else _flattened_until_2_9
"""Return the names of flattened dimensions of a mesh."""
slice_of = _slice_since_2_10 if hasattr(DeviceMesh, "_concatenate") else _slice_until_2_9
"""Return some dimensions of a mesh, in their order."""
changing = _changing_since_2_10 if _KNOWS_ROOT else _changing_until_2_9
"""Context that yields all slices of a mesh, to be changed together with it."""


def take_groups(mesh: DeviceMesh) -> dict[str, Any]:
    """Remove and return the references of a mesh to its groups; it has none before torch 2.11."""
    groups = vars(mesh).get("_pg_registry")
    if groups is None:
        return {}
    vars(mesh)["_pg_registry"] = {}
    return {"_pg_registry": groups}


# ---------------------------------------------------------------------- operations on sharded tensors


def forget_operations() -> None:
    """Clear torch's caches of sharding propagation; since 2.10 there is one in C++ as well."""
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
    getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", lambda: None)()
