"""Flipping a bit: exactly one changes, unnoticed by torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.torch_internals import version_counter
from lightning_ckptless.protocol.fault_script import Fault, FaultKind
from lightning_ckptless.testing.bit_flip import flip

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)


def fault_in(tensor: str, element: int, bit: int) -> Fault:
    return Fault(FaultKind.FLIP, 0, 1, tensor=tensor, element=element, bit=bit)


@given(st.sampled_from(DTYPES), st.integers(0, 19), st.data())
def test_one_bit_changes_and_a_second_flip_restores_it(dtype: torch.dtype, element: int, data: st.DataObject) -> None:
    tensor = torch.arange(20).to(dtype).reshape(5, 4).T
    before = tensor.clone()
    bit = data.draw(st.integers(0, 8 * tensor.element_size() - 1))
    count = version_counter(tensor)
    flip(fault_in("w", element, bit), {"w": tensor})
    changed = (tensor.contiguous().view(torch.uint8) ^ before.contiguous().view(torch.uint8)).flatten().tolist()
    assert sum(value.bit_count() for value in changed) == 1
    place = element * tensor.element_size() + bit // 8
    assert changed[place] == 1 << bit % 8
    assert version_counter(tensor) == count
    flip(fault_in("w", element, bit), {"w": tensor})
    assert torch.equal(tensor, before)


def test_a_scalar_is_flipped() -> None:
    tensor = torch.tensor(1.0)
    flip(fault_in("w", 0, 31), {"w": tensor})
    assert tensor.item() == -1.0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (fault_in("parameter/fc.wieght", 0, 0), "the closest are parameter/fc.weight, parameter/fc.bias"),
        (fault_in("parameter/fc.bias", 3, 0), "parameter/fc.bias has 3 elements of 32 bits"),
        (fault_in("parameter/fc.bias", 0, 32), "parameter/fc.bias has 3 elements of 32 bits"),
    ],
)
def test_what_does_not_exist_is_refused(fault: Fault, message: str) -> None:
    tensors = {"parameter/fc.weight": torch.zeros(3, 3), "parameter/fc.bias": torch.zeros(3)}
    with pytest.raises(OptionsError, match=message):
        flip(fault, tensors)
