"""A process that is alone knows its rank and the world size, and operations that need other ranks are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler, TensorDataset

from lightning_ckptless.errors import TransportError
from lightning_ckptless.internals.torch_internals import process_groups
from lightning_ckptless.membership.worker import placeholder_group
from lightning_ckptless.membership.worker.process_groups import World

ONE, THREE = torch.ones(1), torch.ones(3)
COLLECTIVES: dict[str, Callable[[], Any]] = {
    "all_reduce": lambda: dist.all_reduce(ONE),
    "all_gather": lambda: dist.all_gather([ONE, ONE, ONE], ONE),
    "all_gather_object": lambda: dist.all_gather_object([None] * 3, "mine"),
    "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(THREE, ONE),
    "broadcast": lambda: dist.broadcast(ONE, 0),
    "broadcast_object_list": lambda: dist.broadcast_object_list([None], 0),
    "reduce": lambda: dist.reduce(ONE, 0),
    "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(ONE, THREE),
    "all_to_all_single": lambda: dist.all_to_all_single(THREE, THREE),
    "gather": lambda: dist.gather(ONE, None, 0),
    "scatter": lambda: dist.scatter(ONE, None, 0),
    "send": lambda: dist.send(ONE, 0),
    "recv": lambda: dist.recv(ONE, 0),
}


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    world.pretend_to_be(1, 3)
    yield world
    world.leave()
    world.release()


def test_rank_and_world_size_are_known(world: World) -> None:
    sampler: Any = DistributedSampler(TensorDataset(torch.arange(6)), shuffle=False)
    assert (dist.get_rank(), dist.get_world_size()) == (1, 3)
    assert list(sampler) == [1, 4]


def test_a_barrier_returns_at_once(world: World) -> None:
    dist.barrier()
    placeholder_group.require_no_refusals()


@pytest.mark.parametrize("name", COLLECTIVES)
def test_operations_that_need_other_ranks_are_refused(name: str, world: World) -> None:
    with pytest.raises((TransportError, RuntimeError)):
        COLLECTIVES[name]()


def test_a_refusal_is_remembered_even_if_the_script_handles_it(world: World) -> None:
    with pytest.raises(TransportError):
        dist.all_reduce(ONE)
    with pytest.raises(TransportError, match="the collective allreduce was called before training by a new process"):
        placeholder_group.require_no_refusals()


def test_a_group_that_needs_other_ranks_fails_at_once(world: World) -> None:
    with pytest.raises(RuntimeError, match="Not implemented"):
        dist.new_group([0, 1], backend="gloo")


def test_groups_of_a_block_that_fails_half_way_are_ours(world: World) -> None:
    with suppress(TransportError), world.making():
        dist.new_group([1])
        raise TransportError("another rank died")
    assert world.foreign_groups() == 0


def test_the_group_is_ours_and_leaves_nothing_behind(world: World) -> None:
    assert world.foreign_groups() == 0
    world.leave()
    assert not dist.is_initialized()
    assert process_groups() == []
