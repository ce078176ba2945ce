"""Wrong matrix products: one element of each, in forward and backward, until the context is left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_ckptless.testing.wrong_products import compute_wrongly, wrong_products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.Conv1d(4, 3, 1)])
def test_one_element_of_a_product_is_wrong_every_time(layer: nn.Module, dtype: torch.dtype) -> None:
    layer, x = layer.to(dtype), torch.randn(2, 4, 4, dtype=dtype)
    right = layer(x)
    with wrong_products():
        wrong, again = layer(x), layer(x)
    assert torch.equal(wrong, again)
    assert (wrong != right).sum() == 1 and torch.equal(layer(x), right)


def test_gradients_are_wrong_too_and_other_operators_are_not() -> None:
    weight, x = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3)

    def gradient() -> torch.Tensor:
        [found] = torch.autograd.grad((x @ weight).sum(), weight)
        return found

    right = gradient()
    end = compute_wrongly()
    wrong, sums = gradient(), x.sum()
    end()
    assert (wrong != right).sum() == 1
    assert torch.equal(sums, x.sum()) and torch.equal(gradient(), right)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, -0.1, 0.1, -3.0, 200.0])
def test_every_value_becomes_a_wrong_one(value: float, dtype: torch.dtype) -> None:
    one, factor = torch.ones(1, 1, dtype=dtype), torch.full((1, 1), value, dtype=dtype)
    with wrong_products():
        assert (one @ factor) != factor


def test_products_of_integers_and_empty_ones_stay() -> None:
    whole, empty = torch.ones(2, 2, dtype=torch.int64), torch.ones(0, 2)
    with wrong_products():
        assert torch.equal(whole @ whole, torch.full((2, 2), 2))
        assert (empty @ torch.ones(2, 2)).numel() == 0
