"""Every tensor of the training state has one stable name, and is read from its current place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.trainer.state.tensors import (
    StateIndex,
    callback_modules,
    make_room_for_buffers,
    make_room_for_optimizer_state,
    optimizer_facts,
    optimizer_parameters,
    set_optimizer_facts,
)
from tests.lab.kinds import Rounded


@dataclass
class Trainer:
    """The part of a trainer that holds state."""

    lightning_module: Any
    optimizers: list[Any]
    callbacks: list[Any] = field(default_factory=list)
    strategy: Any = field(default_factory=lambda: SimpleNamespace(model=None))

    def step(self) -> None:
        """Step each optimizer once, with gradients that depend on the parameters."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for number, parameter in enumerate(group["params"]):
                    parameter.grad = (parameter.detach() + number + 1).sin()
            optimizer.step()


class Net(nn.Module):
    norm: Any
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mask", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1)


def trained(make: Callable[..., Any] = adamw, steps: int = 1) -> Trainer:
    net = Net()
    trainer = Trainer(net, [make(net.parameters())])
    for _ in range(steps):
        trainer.step()
    return trainer


# ---------------------------------------------------------------------- names


def test_parameters_and_buffers_have_names() -> None:
    index = StateIndex(trained(steps=0))
    assert [*index.read()] == [
        "parameter/scale", "buffer/mask",
        "parameter/first.weight", "parameter/first.bias",
        "parameter/norm.weight", "parameter/norm.bias",
        "buffer/norm.running_mean", "buffer/norm.running_var", "buffer/norm.num_batches_tracked",
        "parameter/last.weight", "parameter/last.bias",
    ]  # fmt: skip
    assert index.private == {name for name in index.read() if name.startswith("buffer/")}


def test_optimizer_state_is_named_by_its_parameter() -> None:
    names = [name for name in StateIndex(trained()).read() if name.startswith("optimizer/0/norm.weight/")]
    assert names == [f"optimizer/0/norm.weight/{key}" for key in ("step", "exp_avg", "exp_avg_sq")]


def test_names_are_the_same_in_every_step_and_process() -> None:
    trainer = trained(steps=1)
    index = StateIndex(trainer)
    names = [*index.read()]
    trainer.step()
    assert [*index.read()] == names == [*StateIndex(trained(steps=3)).read()]


def test_shared_parameters_are_read_once() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    names = [*StateIndex(Trainer(net, [torch.optim.SGD(net.parameters(), 0.1)])).read()]
    assert names == ["parameter/0.weight", "parameter/0.bias", "parameter/1.bias"]


def test_a_module_used_twice_is_read_once() -> None:
    layer = nn.BatchNorm1d(2)
    names = [*StateIndex(Trainer(nn.Sequential(layer, layer), [])).read()]
    assert len(names) == 5
    assert all("/0." in name for name in names)


def test_modules_in_callbacks_are_part_of_the_state() -> None:
    trainer = trained(steps=0)
    average = type("Average", (), {})()
    average.average, average.model, average.count = nn.BatchNorm1d(1), trainer.lightning_module.norm, 3
    trainer.callbacks = [object.__new__(type("Empty", (), {})), average]
    assert [prefix for prefix, _ in callback_modules(trainer)] == ["callback/1.Average.average"]
    index = StateIndex(trainer)
    assert "callback/1.Average.average/parameter/weight" in index.read()
    assert "callback/1.Average.average/buffer/running_mean" in index.private


def test_parameters_outside_the_model_are_named_by_group_and_index() -> None:
    net, free = nn.Linear(2, 2), torch.ones(3, requires_grad=True)
    groups: list[dict[str, Any]] = [{"params": [net.weight, net.bias]}, {"params": [free], "lr": 0.5}]
    trainer = Trainer(net, [torch.optim.Adam(groups, lr=0.1)])
    assert [*optimizer_parameters(trainer, 0)] == ["weight", "bias", "#1.0"]
    assert StateIndex(trainer).read()["optimizer/0/#1.0/value"] is free
    trainer.step()
    names = [name for name in StateIndex(trainer).read() if "#1.0" in name]
    assert sorted(names) == [f"optimizer/0/#1.0/{key}" for key in ("exp_avg", "exp_avg_sq", "step", "value")]


# ---------------------------------------------------------------------- current tensors


def test_replaced_tensors_are_read() -> None:
    trainer = trained()
    net, index = trainer.lightning_module, StateIndex(trainer)
    index.read()
    net.norm.running_mean, net.mask = torch.full((2,), 7.0), torch.zeros(2)
    net.first.weight = nn.Parameter(torch.full((2, 3), 5.0))
    state = trainer.optimizers[0].state[net.last.bias]
    state["exp_avg"] = torch.full((3,), 3.0)
    now = index.read()
    assert now["buffer/norm.running_mean"] is net.norm.running_mean
    assert now["buffer/mask"] is net.mask
    assert now["parameter/first.weight"] is net.first.weight
    assert now["optimizer/0/last.bias/exp_avg"] is state["exp_avg"]


def test_the_first_step_of_an_optimizer_is_detected() -> None:
    trainer = trained(steps=0)
    index = StateIndex(trainer)
    assert index.is_current()
    trainer.step()
    assert not index.is_current()
    index = StateIndex(trainer)
    trainer.step()
    assert index.is_current()


def test_the_first_gradient_of_a_parameter_is_detected() -> None:
    trainer = trained(steps=0)
    (optimizer,) = trainer.optimizers
    frozen = trainer.lightning_module.last.bias
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = None if parameter is frozen else torch.ones_like(parameter)
    optimizer.step()
    index = StateIndex(trainer)
    optimizer.step()
    assert index.is_current()
    trainer.step()
    assert not index.is_current()


def test_a_new_buffer_is_detected() -> None:
    trainer = trained()
    net, index = trainer.lightning_module, StateIndex(trainer)
    net.mask = torch.zeros(2)
    assert index.is_current()
    net.nothing = torch.ones(3)
    assert not index.is_current()
    index = StateIndex(trainer)
    assert index.read()["buffer/nothing"] is net.nothing
    net.norm.register_buffer("later", torch.ones(1))
    assert not index.is_current()
    assert "buffer/norm.later" in StateIndex(trainer).private


def test_a_loaded_optimizer_state_is_detected() -> None:
    trainer = trained(steps=2)
    index, (optimizer,) = StateIndex(trainer), trainer.optimizers
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not index.is_current()
    found = StateIndex(trainer).read()["optimizer/0/scale/exp_avg"]
    assert found is optimizer.state[trainer.lightning_module.scale]["exp_avg"]


class Counting(torch.optim.SGD):
    """Keeps a global counter, and a string for each parameter."""

    state: Any

    def step(self, closure: Any = None) -> Any:
        self.state["steps"] = self.state.get("steps", 0) + 1
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["word"] = f"step {self.state['steps']}"
        return super().step(closure)


def test_plain_optimizer_state_is_restored() -> None:
    trainer, fresh = (trained(lambda p: Counting(p, lr=0.1), steps) for steps in (3, 0))
    assert StateIndex(trainer).is_current()
    set_optimizer_facts(fresh, unpack(pack(optimizer_facts(trainer))))
    assert fresh.optimizers[0].state["steps"] == 3
    assert fresh.optimizers[0].state[fresh.lightning_module.scale]["word"] == "step 3"


def test_counts_that_an_optimizer_has_made_since_are_removed() -> None:
    trainer = trained(lambda p: Rounded(p, lr=0.1), 0)
    before = unpack(pack(optimizer_facts(trainer)))
    trainer.step()
    set_optimizer_facts(trainer, before)
    [optimizer] = trainer.optimizers
    assert "steps" not in optimizer.state and optimizer.calls == 0
    assert "count" not in optimizer.state[trainer.lightning_module.scale]


# ---------------------------------------------------------------------- into a fresh trainer

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": adamw,
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "NAdam": torch.optim.NAdam,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "RAdam": torch.optim.RAdam,
    "LR in a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False),
    "counting": lambda p: Counting(p, lr=0.1, momentum=0.9),
}


def move(source: Trainer, target: Trainer) -> None:
    """Copy one trainer's state into another, as a recovery does."""
    saved = {name: tensor.detach().clone() for name, tensor in StateIndex(source).read().items()}
    facts = unpack(pack(optimizer_facts(source)))
    described = {n: (t.dtype, tuple(t.shape)) for n, t in saved.items() if n.startswith("optimizer/")}
    make_room_for_optimizer_state(target, described)
    live = StateIndex(target).read()
    assert {*live} == {*saved}
    with torch.no_grad():
        for name, tensor in live.items():
            assert (tensor.dtype, tensor.shape, tensor.device) == (
                saved[name].dtype, saved[name].shape, saved[name].device,
            )  # fmt: skip
            tensor.copy_(saved[name])
    set_optimizer_facts(target, facts)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_an_optimizer_continues_in_a_fresh_trainer(kind: str, steps: int) -> None:
    trainer, fresh = trained(OPTIMIZERS[kind], steps), trained(OPTIMIZERS[kind], 0)
    trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.25
    move(trainer, fresh)
    for either in (trainer, fresh):
        either.step()
    assert fresh.optimizers[0].param_groups[0]["weight_decay"] == 0.25
    for (name, expected), found in zip(
        trainer.lightning_module.named_parameters(), fresh.lightning_module.parameters(), strict=True
    ):
        assert torch.equal(expected, found), name


def test_a_tensor_learning_rate_is_restored_in_place() -> None:
    trainer, fresh = (trained(OPTIMIZERS["LR in a tensor"], steps) for steps in (1, 0))
    trainer.optimizers[0].param_groups[0]["lr"].fill_(0.25)
    rate = fresh.optimizers[0].param_groups[0]["lr"]
    set_optimizer_facts(fresh, unpack(pack(optimizer_facts(trainer))))
    assert fresh.optimizers[0].param_groups[0]["lr"] is rate
    assert rate == 0.25


def test_a_parameter_outside_the_model_is_restored() -> None:
    def make(value: float) -> Trainer:
        free = torch.full((2,), value, requires_grad=True)
        return Trainer(nn.Linear(1, 1), [torch.optim.SGD([free], lr=0.1, momentum=0.9)])

    trainer, fresh = make(1.0), make(0.0)
    trainer.step()
    move(trainer, fresh)
    for either in (trainer, fresh):
        either.step()
    (expected,), (found,) = (t.optimizers[0].param_groups[0]["params"] for t in (trainer, fresh))
    assert torch.equal(expected, found)


@pytest.mark.parametrize(("options", "where"), [({}, "cpu"), ({"capturable": True}, "meta"), ({"fused": True}, "meta")])
@pytest.mark.parametrize("shape", [(3,), ()], ids=["vector", "scalar"])
def test_optimizer_tensors_are_created_on_the_device_that_the_optimizer_uses(
    options: dict[str, Any], where: str, shape: tuple[int, ...]
) -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.empty(shape, device="meta"))
    optimizer = torch.optim.AdamW([net.weight])
    optimizer.param_groups[0].update(options)
    described = {
        "optimizer/0/weight/step": (torch.float32, ()),
        "optimizer/0/weight/exp_avg": (torch.bfloat16, shape),
        "optimizer/0/weight/row": (torch.float32, (2,)),
    }
    make_room_for_optimizer_state(Trainer(net, [optimizer]), described)
    state = optimizer.state[net.weight]
    assert {key: t.device.type for key, t in state.items()} == {"step": where, "exp_avg": "meta", "row": "meta"}
    assert state["exp_avg"].dtype == torch.bfloat16
    assert not state["exp_avg"].requires_grad


def test_created_optimizer_tensors_have_the_memory_format_of_the_parameter() -> None:
    net = nn.Conv2d(3, 2, 2)
    net.weight = nn.Parameter(net.weight.to(memory_format=torch.channels_last))
    trainer = Trainer(net, [adamw(net.parameters())])
    make_room_for_optimizer_state(trainer, {"optimizer/0/weight/exp_avg": (torch.float32, (2, 3, 2, 2))})
    assert trainer.optimizers[0].state[net.weight]["exp_avg"].stride() == net.weight.stride()


def test_no_optimizer_tensors_are_created_for_missing_parameters() -> None:
    trainer = trained(steps=0)
    described: dict[str, Any] = {
        f"optimizer/{name}/exp_avg": (torch.float32, (1,)) for name in ("0/gone.weight", "1/first.weight", "0/#0.9")
    }
    make_room_for_optimizer_state(trainer, described)
    assert not trainer.optimizers[0].state


def test_buffers_that_a_model_creates_on_first_use_are_created() -> None:
    trainer = trained(steps=0)
    net = trainer.lightning_module
    mask = net.mask
    described = {
        "buffer/nothing": (torch.float64, (2, 3)),
        "buffer/norm.later": (torch.bool, ()),
        "buffer/mask": (torch.int64, (5,)),
        "buffer/gone.cache": (torch.float32, (1,)),
        "parameter/norm.new": (torch.float32, (1,)),
        "callback/0.Average.model/buffer/mask": (torch.float32, (1,)),
    }
    make_room_for_buffers(trainer, described)
    found = {name: t for name, t in StateIndex(trainer).read().items() if name in described}
    assert {*found} == {"buffer/nothing", "buffer/norm.later", "buffer/mask"}
    assert (net.nothing.dtype, net.nothing.shape) == (torch.float64, (2, 3))
    assert (net.norm.later.dtype, net.norm.later.shape) == (torch.bool, ())
    # A changed model gets no new tensors: the comparison of layouts reports it.
    assert net.mask is mask


def test_restoring_plain_optimizer_values_does_not_invalidate_the_index() -> None:
    trainer, fresh = counting(steps=2), counting(steps=0)
    move(trainer, fresh)
    index = StateIndex(fresh)
    fresh.optimizers[0].state[fresh.lightning_module.weight]["more"] = 1
    assert not index.is_current()
    index.refresh()
    assert index.is_current()


def test_attributes_of_a_user_defined_optimizer_are_restored() -> None:
    trainer, fresh = counting(steps=2), counting(steps=0)
    move(trainer, fresh)
    assert fresh.optimizers[0].calls == 2
    assert set(optimizer_facts(trainer)[0]["plain"]) == {"calls"}
    assert optimizer_facts(trained())[0]["plain"] == {}


def counting(steps: int) -> Trainer:
    net = nn.Linear(1, 1)
    trainer = Trainer(net, [Rounded(net.parameters(), 0.1)])
    torch.optim.lr_scheduler.StepLR(trainer.optimizers[0], 1)
    for _ in range(steps):
        trainer.step()
    return trainer


@pytest.mark.parametrize("groups", [[], [1, 1], [2]], ids=str)
def test_different_parameter_groups_are_rejected(groups: list[int]) -> None:
    net = nn.Linear(1, 1)
    made = [
        torch.optim.SGD([{"params": [p]} for p in (net.weight, net.bias)[:count]] or [net.weight], lr=0.1)
        for count in groups
    ]
    with pytest.raises(LayoutMismatchError, match=r"have \[1\] parameter groups.*configure_optimizers\(\) must return"):
        set_optimizer_facts(Trainer(net, made), optimizer_facts(trained()))
