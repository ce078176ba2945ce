"""Gradients are captured only if a step uses those of the step before."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ckptless.trainer.state.kept_gradients import KeptGradients


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, keeps: str = "", kept: KeptGradients | None = None
) -> None:
    """Run a step as Lightning does, with the backward pass within the optimizer's step."""

    def closure() -> Any:
        if not keeps:
            optimizer.zero_grad()
        elif keeps == "part":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)
        elif keeps == "nothing":
            model.zero_grad(set_to_none=False)
        if kept is not None:
            kept.before_backward()
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("keeps", ["", "all", "part", "nothing"])
def test_only_kept_gradients_are_captured(keeps: str) -> None:
    """Those that are zeroed in place are not kept, though they are the same tensors."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kept = KeptGradients(model, [optimizer])
    assert kept.capture() is None
    step(model, optimizer, keeps=keeps, kept=kept)
    # Unknown yet.
    assert kept.capture() is not None
    for _ in range(3):
        step(model, optimizer, keeps=keeps, kept=kept)
        captured = kept.capture()
        assert (captured is None) == (keeps in ("", "nothing"))
        assert captured is None or captured["weight"] is model.weight.grad


@pytest.mark.parametrize("keeps", ["", "nothing"])
def test_gradients_of_another_optimizer_are_not_kept_by_being_there(keeps: str) -> None:
    """Of two networks that train in turns, each zeroes its own gradients before its own backward pass."""
    models = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    kept = KeptGradients(models, optimizers)
    captured = kept.capture()
    for _ in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, keeps=keeps, kept=kept)
        captured = kept.capture()
    assert captured is None


def test_large_gradients_that_are_kept_are_told() -> None:
    told: list[int] = []
    model = nn.Linear(2, 1_500_000, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kept = KeptGradients(model, [optimizer], lambda: told.append(1))
    step(model, optimizer, keeps="all")
    assert kept.capture() is None and told == []
    step(model, optimizer, keeps="all")
    assert kept.capture() is None and told == [1]


def test_the_optimizer_is_left_as_it_was() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kept = KeptGradients(model, [optimizer])
    assert len(vars(optimizer)["_optimizer_step_post_hooks"]) == 1
    del kept
    gc.collect()
    assert not vars(optimizer)["_optimizer_step_post_hooks"]
