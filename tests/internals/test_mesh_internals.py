"""The private torch names for sharded models behave as expected, tested with fake process groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_ckptless.internals.mesh_internals import (
    become,
    forget_iteration,
    make_room_for_part,
    number_groups_from,
    obstacle_to_resharding,
    one_by_one,
    reshard_in_place,
    shard_box,
    uneven_parameters,
)
from lightning_ckptless.internals.mesh_versions import forget_operations, parameter_groups
from lightning_ckptless.internals.torch_internals import open_fake_groups


@contextmanager
def pretended(rank: int, world_size: int = 4) -> Iterator[None]:
    """Context with a fake default process group."""
    # Torch caches operations by equal meshes, but with the coordinates of another rank.
    forget_operations()
    open_fake_groups(rank, world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mesh_of_four() -> DeviceMesh:
    return mesh_of(2, 2)


def mesh_of(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))


def modules_of(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def cover(shape: tuple[int, ...], make: Callable[[DeviceMesh], DTensor]) -> torch.Tensor:
    """Count how many of four ranks hold each element."""
    counts = torch.zeros(shape, dtype=torch.int64)
    for rank in range(4):
        with pretended(rank):
            tensor = make(mesh_of_four())
            box = shard_box(tensor)
            assert box is not None
            offsets, sizes = box
            assert sizes == tuple(tensor.to_local().shape)
            counts[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    return counts


@pytest.mark.parametrize("rows", [8, 5, 3, 1])
@pytest.mark.parametrize(
    ("placements", "holders"),
    [
        ((Shard(0), Replicate()), 2),
        ((Shard(0), Shard(1)), 1),
        ((Replicate(), Replicate()), 4),
        ((Shard(0), Shard(0)), 1),
    ],
    ids=str,
)
def test_the_boxes_of_all_ranks_cover_a_tensor(rows: int, placements: tuple[Any, ...], holders: int) -> None:
    def make(mesh: DeviceMesh) -> DTensor:
        whole = torch.zeros(rows, 6)
        tensor = DTensor.from_local(whole, mesh, [Replicate(), Replicate()], run_check=False)
        return tensor.redistribute(mesh, placements)

    assert (cover((rows, 6), make) == holders).all()


@pytest.mark.parametrize(("rows", "box"), [(8, ((6, 0), (2, 4))), (10, None)])
def test_rows_sharded_by_both_kinds_of_parallelism(rows: int, box: object) -> None:
    """The rows of a rank are contiguous only if the sizes divide evenly."""
    # A single rank, as torch caches by mesh the coordinates of the rank that came first.
    with pretended(3):
        mesh = mesh_of_four()
        layer = nn.Sequential(nn.Linear(4, rows))
        parallelize_module(layer, mesh["tensor"], {"0": ColwiseParallel()})
        fully_shard(layer, mesh=mesh["data"])
        weight = layer.get_parameter("0.weight")
        assert isinstance(weight, DTensor)
        assert shard_box(weight) == box


def test_a_partial_tensor_has_no_box() -> None:
    with pretended(3):
        placements = [Partial(), Replicate()]
        assert shard_box(DTensor.from_local(torch.zeros(2, 2), mesh_of_four(), placements, run_check=False)) is None


@pytest.mark.parametrize(("first", "has_same_names"), [(100, True), (200, False)], ids=["same names", "other names"])
def test_a_mesh_and_its_slices_adopt_the_groups_of_a_new_generation(first: int, has_same_names: bool) -> None:
    with pretended(1):
        number_groups_from(100)
        mesh = mesh_of_four()
        data, names = mesh["data"], list(mesh._dim_group_names)
        before = data.get_group()
    with pretended(1):
        dist.new_group([0, 1])
        number_groups_from(first)
        assert not become(mesh, mesh_of_four())
        assert (list(mesh._dim_group_names) == names) == has_same_names
        assert data.get_group() is not before
        assert data.get_group() in dist.distributed_c10d._world.pg_map
        assert data == mesh["data"]


def test_groups_are_not_split_from_a_device_bound_group() -> None:
    with pretended(1):
        group: Any = dist.distributed_c10d._get_default_group()
        group.bound_device_id = device = torch.device("cuda", 0)
        with one_by_one():
            inside = [group.bound_device_id]
        assert (inside, group.bound_device_id) == ([None], device)
        group.bound_device_id = None


def test_an_interrupted_pass_is_reset() -> None:
    class Breaks(nn.Module):
        broken = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.broken:
                raise OSError("the link is down")
            return x

    with pretended(0):
        mesh, breaks = mesh_of_four(), Breaks()
        network = nn.Sequential(nn.Linear(4, 4), breaks)
        for part in (network[0], network):
            fully_shard(part, mesh=mesh["data"])
        modules = modules_of(network)
        forget_iteration(modules)
        with pytest.raises(OSError, match="the link"):
            network(torch.zeros(1, 4))
        forget_iteration(modules)
        assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
        Breaks.broken = False
        network(torch.zeros(1, 4)).sum().backward()


def sharded(mesh: DeviceMesh, **options: Any) -> nn.Sequential:
    """Shard two layers with an odd number of rows, with tensor parallelism if the mesh has it."""
    network = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5, bias=False))
    if mesh["tensor"].size() > 1:
        parallelize_module(network, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    for part in (network[0], network):
        fully_shard(part, mesh=mesh["data"], **options)
    return network


def held_by(network: nn.Module) -> list[tuple[Any, ...]]:
    """Return this rank's part of every parameter, and how much of it torch sends."""
    groups = [group for module in modules_of(network) for group in parameter_groups(module._get_fsdp_state())]
    of_torch = [(*p.sharded_size, p._sharded_param_data.numel()) for group in groups for p in group.fsdp_params]
    return [
        (p.shape, p.to_local().shape, shard_box(p)) for p in network.parameters() if isinstance(p, DTensor)
    ] + of_torch


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 4, (4, 1)), (1, 3, (3, 1))), ((2, 3, (3, 1)), (2, 4, (4, 1))), ((3, 4, (2, 2)), (1, 2, (1, 2))),
     ((0, 4, (4, 1)), (3, 4, (4, 1)))],
    ids=["fewer", "more", "both kinds", "another rank"],
)  # fmt: skip
def test_a_model_is_resharded_in_place_for_another_world(before: Any, after: Any) -> None:
    rank, ranks, sizes = before
    with pretended(rank, ranks):
        mesh = mesh_of(*sizes)
        data, network = mesh["data"], sharded(mesh)
        modules = modules_of(network)
        optimizer = torch.optim.AdamW(network.parameters())
        network(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for module in modules:
            module.reshard()
    rank, ranks, sizes = after
    with pretended(rank, ranks):
        expected = held_by(sharded(mesh_of(*sizes)))
        rebuilt = mesh_of(*sizes)
        known = list(network.parameters())
        assert become(mesh, rebuilt)
        forget_iteration(modules)
        assert {id(parameter) for parameter in reshard_in_place(modules)} == set(map(id, known))
        assert (mesh, data) == (rebuilt, rebuilt["data"]) and hash(data) == hash(rebuilt["data"])
        assert data.get_group() in dist.distributed_c10d._world.pg_map
        assert [id(parameter) for parameter in network.parameters()] == [id(parameter) for parameter in known]
        assert held_by(network) == expected
        for parameter in known:
            assert isinstance(parameter, DTensor)
            for key in ("exp_avg", "exp_avg_sq"):
                moment = optimizer.state[parameter][key]
                make_room_for_part(moment, mesh)
                assert moment.to_local().shape == parameter.to_local().shape
        network(torch.ones(1, 4)).sum().backward()
        optimizer.step()


def test_a_dimension_that_does_not_divide_evenly_is_reported() -> None:
    with pretended(1):
        mesh = mesh_of(4, 1)
        network = nn.Sequential(nn.Linear(8, 2))
        fully_shard(network, mesh=mesh["data"], shard_placement_fn=lambda p: Shard(p.ndim - 1) if p.ndim > 1 else None)
        network(torch.ones(1, 8))
    with pretended(1, 3):
        become(mesh, mesh_of(3, 1))
        forget_iteration(modules_of(network))
        assert uneven_parameters(modules_of(network)) == [("0.weight", [2, 8], 1, 3)]
        with pytest.raises(NotImplementedError, match="uneven"):
            reshard_in_place(modules_of(network))


def test_obstacles_to_resharding_are_reported() -> None:
    def obstacle(network: nn.Module, mesh: DeviceMesh) -> str:
        return obstacle_to_resharding(modules_of(network), network.parameters(), mesh)

    with pretended(0):
        mesh, other = mesh_of(4, 1), mesh_of(4, 1)
        assert obstacle(sharded(mesh), mesh) == ""
        assert "another mesh" in obstacle(sharded(other), mesh)
        assert "reshard_after_forward is a number" in obstacle(sharded(mesh, reshard_after_forward=2), mesh)
        mesh._flatten("all")
        assert "flattened, into all" in obstacle(sharded(mesh), mesh)
