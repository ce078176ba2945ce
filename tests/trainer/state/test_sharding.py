"""The state of sharded models, in a process with a fake process group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_ckptless.errors import LayoutMismatchError, OptionsError
from lightning_ckptless.internals.torch_internals import open_fake_groups
from lightning_ckptless.replica.layout.tensor_spec import Box
from lightning_ckptless.trainer.state.layout_tensors import describe_state
from lightning_ckptless.trainer.state.module_attributes import ModuleAttributes
from lightning_ckptless.trainer.state.sharding import sharded_modules
from lightning_ckptless.trainer.state.tensors import StateIndex, make_room_for_optimizer_state, require_room


class Layer(nn.Module):
    """A user-defined layer with an attribute that is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5)
        self.names = ["a"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y


class Net(nn.Module):
    """A layer that is sharded, and a parameter that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x) * self.scale
        return y


@dataclass
class Trainer:
    """The part of a trainer that holds state."""

    lightning_module: nn.Module
    optimizers: list[Any]
    callbacks: list[Any] = field(default_factory=list)
    strategy: Any = field(default_factory=lambda: SimpleNamespace(model=None))
    global_rank: int = 1
    global_step: int = 1


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    """Return the trainer of rank 1 of 2, after one step."""
    open_fake_groups(1, 2)
    net = Net()
    fully_shard(net.layer, mesh=init_device_mesh("cpu", (2,)))
    trainer = Trainer(net, [torch.optim.AdamW(net.parameters(), 0.1)])
    net(torch.ones(2, 3)).sum().backward()
    trainer.optimizers[0].step()
    yield trainer
    dist.destroy_process_group()


def test_a_rank_reads_its_local_part(trainer: Trainer) -> None:
    read = StateIndex(trainer).read()
    assert {name: tuple(t.shape) for name, t in read.items() if name.startswith("parameter/")} == {
        "parameter/scale": (),
        "parameter/layer.inner.weight": (2, 3),
        "parameter/layer.inner.bias": (2,),
    }
    assert tuple(read["optimizer/0/layer.inner.weight/exp_avg"].shape) == (2, 3)


def test_unsharded_parameters_left_in_place_are_not_read(trainer: Trainer) -> None:
    index = StateIndex(trainer)
    net = trainer.lightning_module
    for known in (index, None):
        with torch.no_grad():
            net(torch.ones(2, 3))
        assert not isinstance(net.get_parameter("layer.inner.weight"), DTensor)
        assert tuple((known or StateIndex(trainer)).read()["parameter/layer.inner.weight"].shape) == (2, 3)


def test_only_tensors_that_are_not_sharded_are_compared_by_digest(trainer: Trainer) -> None:
    described = {d.name: d for d in describe_state(StateIndex(trainer), replicated=False)}
    weight, scale = described["parameter/layer.inner.weight"], described["parameter/scale"]
    assert (weight.shape, weight.box, weight.digest) == ((5, 3), Box((3, 0), (2, 3)), "")
    assert scale.box is None and scale.digest.startswith("xxh3:")
    assert described["optimizer/0/layer.inner.weight/step"].digest
    known = {d.name: d for d in describe_state(StateIndex(trainer))}
    assert known["parameter/scale"].digest == ""


def test_a_fresh_optimizer_gets_tensors_sharded_like_its_parameters(trainer: Trainer) -> None:
    (optimizer,) = trainer.optimizers
    described = {d.name: (torch.float32, d.shape) for d in describe_state(StateIndex(trainer)) if "optimizer" in d.name}
    expected = describe_state(StateIndex(trainer))
    optimizer.state.clear()
    make_room_for_optimizer_state(trainer, described)
    assert describe_state(StateIndex(trainer)) == expected


def test_optimizer_state_sharded_differently_from_its_parameter_is_rejected(trainer: Trainer) -> None:
    require_room(trainer)
    weight, (optimizer,) = trainer.lightning_module.get_parameter("layer.inner.weight"), trainer.optimizers
    assert isinstance(weight, DTensor)
    optimizer.state[weight]["row"] = weight.redistribute(placements=[Replicate()])
    with pytest.raises(OptionsError, match=r"AdamW\): row of layer.inner.weight is \[5, 3\] over .*Replicate"):
        require_room(trainer)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_tensor_whose_sharding_changes_in_training_is_rejected(trainer: Trainer, name: str) -> None:
    index = StateIndex(trainer)
    index.read()
    weight, (optimizer,) = trainer.lightning_module.get_parameter("layer.inner.weight"), trainer.optimizers
    assert isinstance(weight, DTensor)
    optimizer.state[weight][name] = optimizer.state[weight][name].redistribute(placements=[Shard(1)])
    with pytest.raises(
        LayoutMismatchError,
        match=rf"rank 1: optimizer/0/layer.inner.weight/{name} is \[5, 3\] over .*dim=1.* at step 1, it was .*dim=0",
    ):
        index.read()


def test_attributes_of_a_sharded_user_layer_are_captured(trainer: Trainer) -> None:
    net = trainer.lightning_module
    assert [type(module).__name__ for module in sharded_modules(net)] == ["FSDPLayer"]
    saved = ModuleAttributes(net).capture()
    assert saved["plain"]["layer"]["names"] == ["a"]
