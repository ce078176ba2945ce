"""Which tensors are assumed to be static."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from lightning_ckptless.trainer.state.static import StaticWatch
from lightning_ckptless.trainer.state.tensors import StateIndex


def index_of(model: nn.Module, *optimizers: torch.optim.Optimizer) -> StateIndex:
    trainer = SimpleNamespace(lightning_module=model, callbacks=[], optimizers=list(optimizers))
    trainer.strategy = SimpleNamespace(model=model)
    return StateIndex(trainer)


def model_of_three() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    model.register_buffer("mask", torch.ones(3))
    return model


def test_at_first_parameters_without_gradients_are_static() -> None:
    assert StaticWatch().look(index_of(model_of_three())) == {"parameter/0.weight", "parameter/0.bias"}


def test_later_unmodified_buffers_are_static_too() -> None:
    model, watch = model_of_three(), StaticWatch()
    watch.look(index_of(model))
    model(torch.ones(2, 3))
    assert watch.look(index_of(model)) == {"parameter/0.weight", "parameter/0.bias", "buffer/mask"}


def test_modified_unfrozen_or_replaced_tensors_are_not_static() -> None:
    model, watch = model_of_three(), StaticWatch()
    watch.look(index_of(model))
    with torch.no_grad():
        model.get_parameter("0.weight").add_(1)
    model.get_parameter("0.bias").requires_grad_(True)
    model.mask = torch.ones(3)
    static = {"buffer/1.running_mean", "buffer/1.running_var", "buffer/1.num_batches_tracked"}
    assert watch.look(index_of(model)) == static
    assert watch.look(index_of(model)) == static | {"parameter/0.weight", "buffer/mask"}


def test_optimizer_state_is_never_static() -> None:
    model, watch = model_of_three(), StaticWatch()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    watch.look(index_of(model, optimizer))
    found = watch.look(index_of(model, optimizer))
    assert found and not any(name.startswith("optimizer/") for name in found)


def test_untrained_parameters_are_those_that_no_optimizer_changes() -> None:
    model = model_of_three()
    assert index_of(model, torch.optim.SGD(model.parameters())).untrained == {"parameter/0.weight", "parameter/0.bias"}
    head = index_of(model, torch.optim.SGD(model.get_submodule("2").parameters()))
    assert head.untrained == {f"parameter/{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")}
