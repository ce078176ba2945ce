"""Digests are equal if and only if every bit that matters is equal."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_ckptless.testing.digest import digest_tensors, digest_values

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.uint16,
]  # fmt: skip


class Colour(Enum):
    RED = 1
    BLUE = 2


@dataclass
class Pair:
    left: Any
    right: Any


def of(tensor: Tensor) -> str:
    return digest_tensors({"x": tensor})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_supported(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype)
    assert of(tensor) == of(tensor.clone())
    changed = tensor.clone()
    changed[3] = 0
    assert of(tensor) != of(changed)


def test_dtype_and_shape_count() -> None:
    zeros = [torch.zeros(4), torch.zeros(4, dtype=torch.int32), torch.zeros(2, 2), torch.zeros(0), torch.zeros(0, 3)]
    assert len({of(tensor) for tensor in [*zeros, torch.tensor(0.0)]}) == 6


def test_every_bit_counts() -> None:
    assert of(torch.tensor([0.0])) != of(torch.tensor([-0.0]))
    quiet, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert of(quiet) != of(other)
    assert of(quiet) == of(quiet.clone())


def test_strides_and_views_do_not_count() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    assert of(matrix.t()) == of(matrix.t().contiguous())
    assert of(matrix[:, ::2]) == of(matrix[:, ::2].clone())
    complex_ = torch.complex(matrix, matrix + 1)
    assert of(complex_.conj()) == of(complex_.conj().resolve_conj())
    assert of(complex_.conj()) != of(complex_)


def test_names_count_and_their_order_does_not() -> None:
    a, b = torch.tensor(1.0), torch.tensor(2.0)
    assert digest_tensors({"a": a, "b": b}) == digest_tensors({"b": b, "a": a})
    assert digest_tensors({"a": a, "b": b}) != digest_tensors({"a": b, "b": a})
    assert digest_tensors({}) != digest_tensors({"a": torch.zeros(0)})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_sparse_and_quantized() -> None:
    sparse = torch.eye(3).to_sparse()
    assert of(sparse) == of(sparse.clone())
    assert of(sparse) != of(2 * sparse)
    coarse, fine = (torch.quantize_per_tensor(torch.ones(2), scale, 0, torch.qint8) for scale in (1.0, 0.5))
    assert of(coarse) == of(coarse.clone())
    assert of(coarse) != of(fine)


def test_values_that_compare_equal_can_have_different_digests() -> None:
    different = [
        None, 0, 0.0, -0.0, False, "", b"", (0,), {0: 0}, {0}, 1, 1.0, True, "1", b"1", 1 + 0j, np.float32(1),
        np.float64(1), np.ones(1), torch.ones(1), Colour.RED, Colour.BLUE, PurePosixPath("1"), torch.float32,
        Pair(1, 2), Pair(2, 1), float("nan"), float("inf"), "12", ("1", "2"), ["12", ""], object(),
    ]  # fmt: skip
    assert len({digest_values(value) for value in different}) == len(different)


def test_containers_of_one_kind_have_equal_digests() -> None:
    assert digest_values([1, 2]) == digest_values((1, 2)) == digest_values(deque([1, 2]))
    assert digest_values({"a": 1, 2: "b"}) == digest_values(OrderedDict([(2, "b"), ("a", 1)]))
    assert digest_values({1, "a"}) == digest_values(frozenset({"a", 1}))


def test_objects_count_by_their_class() -> None:
    assert digest_values(object()) == digest_values(object())
    assert digest_values({"f": open}) == digest_values({"f": open})


def test_states_of_generators() -> None:
    states = [random.Random(1).getstate(), np.random.RandomState(1).get_state(), torch.Generator().get_state()]
    assert len({digest_values(state) for state in states}) == 3
    assert digest_values(random.Random(1).getstate()) != digest_values(random.Random(2).getstate())


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(PLAIN, PLAIN)
def test_equal_text_means_equal_digest(a: Any, b: Any) -> None:
    """For plain data, `repr` distinguishes the same values as a digest, except for the order of keys."""
    assert (digest_values(a) == digest_values(b)) == (_sorted(a) == _sorted(b))


def _sorted(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{key!r}:{_sorted(item)}" for key, item in value.items())) + "}"
    return "[" + ",".join(map(_sorted, value)) + "]" if isinstance(value, list) else repr(value)
