"""The private torch names of sharded models do what we take them for, in processes that only pretend to have peers."""

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
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_ckptless.mesh_internals import forget_iteration, number_groups_from, shard_box, use_groups_of


@contextmanager
def pretended(rank: int, world_size: int = 4) -> Iterator[None]:
    """A process group that sends nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mesh_of_four() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def cover(shape: tuple[int, ...], make: Callable[[DeviceMesh], DTensor]) -> torch.Tensor:
    """How many of four ranks hold each element."""
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
def test_boxes_cover_a_tensor(rows: int, placements: tuple[Any, ...], holders: int) -> None:
    def make(mesh: DeviceMesh) -> DTensor:
        whole = torch.zeros(rows, 6)
        tensor = DTensor.from_local(whole, mesh, [Replicate(), Replicate()], run_check=False)
        return tensor.redistribute(mesh, placements)

    assert (cover((rows, 6), make) == holders).all()


@pytest.mark.parametrize(("rows", "box"), [(8, ((6, 0), (2, 4))), (10, None)])
def test_rows_that_both_kinds_of_parallelism_divide(rows: int, box: object) -> None:
    """Side by side, unless one of them does not divide them evenly."""
    # One rank alone: torch remembers for a mesh which rank asked first.
    with pretended(3):
        mesh = mesh_of_four()
        layer = nn.Sequential(nn.Linear(4, rows))
        parallelize_module(layer, mesh["tensor"], {"0": ColwiseParallel()})
        fully_shard(layer, mesh=mesh["data"])
        weight = layer.get_parameter("0.weight")
        assert isinstance(weight, DTensor)
        assert shard_box(weight) == box


def test_what_is_still_to_be_summed_up_is_no_box() -> None:
    with pretended(3):
        placements = [Partial(), Replicate()]
        assert shard_box(DTensor.from_local(torch.zeros(2, 2), mesh_of_four(), placements, run_check=False)) is None


def test_groups_made_anew_get_the_same_names() -> None:
    with pretended(1):
        number_groups_from(100)
        mesh = mesh_of_four()
        data = mesh["data"]
        before = data.get_group()
    with pretended(1):
        dist.new_group([0, 1])
        number_groups_from(100)
        use_groups_of(mesh, mesh_of_four())
        assert data.get_group() is not before
        assert data.get_group() in dist.distributed_c10d._world.pg_map
        with pytest.raises(RuntimeError, match="in the place of"):
            use_groups_of(mesh, mesh_of_four())


def test_a_pass_that_was_cut_off_is_forgotten() -> None:
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
        modules = [module for module in network.modules() if isinstance(module, FSDPModule)]
        forget_iteration(modules)
        with pytest.raises(OSError, match="the link"):
            network(torch.zeros(1, 4))
        forget_iteration(modules)
        assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
        Breaks.broken = False
        network(torch.zeros(1, 4)).sum().backward()
