"""Wrong matrix products, as from a broken arithmetic unit: one element of every product of this process is wrong.

Apart from `fault_injector`, because tests use it without one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from lightning_ckptless.internals.torch_internals import AroundOperators

PRODUCTS = frozenset(f"aten.{name}" for name in ["addmm", "addmv", "baddbmm", "bmm", "convolution", "dot", "mm", "mv"])
"""The operators that compute layers and their gradients."""


def wrong_products() -> AroundOperators:
    """Context in which the first element of every floating-point matrix product of this thread is wrong."""
    return AroundOperators(_spoiled)


def compute_wrongly() -> Callable[[], None]:
    """Enter the context; returns a function that leaves it."""
    entered = ExitStack()
    entered.enter_context(wrong_products())
    return entered.close


def _spoiled(operator: str, call: Callable[[], Any]) -> Any:
    found = call()
    if operator in PRODUCTS and type(found) is torch.Tensor and found.is_floating_point() and found.numel():
        first = found[(0,) * found.dim()]
        # More than a rounding error in every type, and never the same value.
        first.copy_(first.double() + first.double().abs() * 0.01 + 0.001)
    return found
