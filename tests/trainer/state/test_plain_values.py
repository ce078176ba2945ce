"""Plain values that users keep on their modules are captured and restored exactly."""

from __future__ import annotations

import datetime as dt
import enum
import io
import math
import pathlib
import threading
from array import array
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, UserString, defaultdict, deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.formats.pickles import admit
from lightning_ckptless.trainer.state.attribute_snapshot import AttributeSnapshot
from lightning_ckptless.trainer.state.plain_values import (
    MAX_DEPTH,
    is_plain,
    is_same,
    measure,
    plain_attributes,
    set_plain_attributes,
)


class Phase(enum.Enum):
    WARM_UP = 1


class Output(NamedTuple):
    loss: Any


@dataclass
class Record:
    count: int = 0
    seen: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fixed:
    count: int = 0


@dataclass
class Checked:
    """Runs code of its own when it is created."""

    count: int = 0

    def __post_init__(self) -> None:
        self.twice = 2 * self.count


def mapped(path: pathlib.Path) -> np.memmap[Any, Any]:
    path.write_bytes(bytes(16))
    return np.memmap(path, dtype=np.float32)


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


def the_same(left: Any, right: Any) -> bool:
    """Return whether two values are equal in type and bit for bit in value."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        same_kind = (left.dtype, left.shape, left.device) == (right.dtype, right.shape, right.device)
        return same_kind and bool(left.tolist() == right.tolist())
    if isinstance(left, np.ndarray):
        return (left.dtype, left.shape, left.tolist()) == (right.dtype, right.shape, right.tolist())
    if isinstance(left, SimpleNamespace):
        return the_same(vars(left), vars(right))
    if isinstance(left, list | tuple | deque):
        return len(left) == len(right) and all(the_same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict):
        return list(left) == list(right) and all(the_same(left[key], right[key]) for key in left)
    return bool(left == right) or (isinstance(left, float) and math.isnan(left) and math.isnan(right))


def local_record() -> Any:
    @dataclass
    class Local:
        count: int = 0

    return Local()


# ---------------------------------------------------------------------- what is plain

PLAIN = {
    "nothing": None,
    "numbers": [1, 2.5, 3j, True, float("inf")],
    "text": ("a", b"b"),
    "tensor": torch.ones(2),
    "tensor with a graph": torch.ones(2, requires_grad=True) * 2,
    "list of tensors": [torch.ones(2), torch.zeros(())],
    "array": np.arange(3),
    "numpy scalar": np.float64(3),
    "set": {1, frozenset({2})},
    "deque": deque([1.0, 2.0], maxlen=2),
    "ordered": OrderedDict(b=1, a=2),
    "counter": Counter("aab"),
    "default": defaultdict(list, a=[1]),
    "size": torch.Size((1, 2)),
    "range": range(3),
    "enum": Phase.WARM_UP,
    "path": pathlib.PurePosixPath("a/b"),
    "time": [dt.timedelta(seconds=1), dt.datetime(2020, 1, 1, tzinfo=dt.UTC), dt.date(2020, 1, 1)],
    "decimal and fraction": [Decimal("0.1"), Fraction(1, 3), UUID(int=1), dt.time(1, 2)],
    "bytes that can change": bytearray(b"ab"),
    "namespace": SimpleNamespace(a=1, b=[2]),
    "named tuples": [Output(1.0), Output(2.0)],
    "dataclasses": [Record(1, [2]), Fixed(3)],
    "dtype and device": {"dtype": torch.bfloat16, "device": torch.device("cpu")},
    "slice": slice(1, None),
    "compact arrays": [array("d", [1.5]), array("i")],
    "array of plain objects": np.array([1, None, "a"], dtype=object),
    "records in an array": np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
    "containers of the standard library": [UserDict(a=[1]), UserList([1]), UserString("a"), ChainMap({}, {"a": 1})],
    "deepest allowed": nested(MAX_DEPTH),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_data_survives_packing(kind: str) -> None:
    value = PLAIN[kind]
    assert is_plain(value)
    assert the_same(unpack(pack(value)), value.detach() if isinstance(value, torch.Tensor) else value)


ITERATORS: dict[str, Callable[[], Iterator[Any]]] = {
    "count": lambda: count(3, 2),
    "fractional count": lambda: count(0.5),
    "list": lambda: iter([1, 2, 3]),
    "tuple": lambda: iter((1, 2, 3)),
    "range": lambda: iter(range(4)),
    "large range": lambda: iter(range(1 << 70)),
    "text": lambda: iter("abc"),
    "dictionary": lambda: iter({"a": 1, "b": 2}.items()),
    "backwards": lambda: reversed([1, 2, 3]),
    "numbered": lambda: enumerate("abc"),
    "together": lambda: zip(count(), "abc", strict=False),
}


@pytest.mark.parametrize("kind", ITERATORS)
def test_an_iterator_continues_where_it_was(kind: str) -> None:
    """Reading it for a version does not advance it."""
    iterator = ITERATORS[kind]()
    next(iterator)
    assert is_plain(iterator) and measure(iterator, 1000) is not None
    packed = admit(pack(iterator))
    assert next(unpack(packed)) == next(iterator)


@pytest.mark.parametrize("kind", ITERATORS)
def test_an_iterator_is_read_again_at_every_version(kind: str) -> None:
    iterator = ITERATORS[kind]()
    seen = AttributeSnapshot()
    seen.look({"it": iterator})
    next(iterator)
    assert seen.look({"it": iterator}) == ["it"]


NOT_PLAIN = {
    "iterator over objects": iter([object()]),
    "generator": (x for x in (1, 2)),
    "parameter": torch.nn.Parameter(torch.ones(1)),
    "tensor that is trained": torch.ones(1, requires_grad=True),
    "list with a parameter": [torch.nn.Parameter(torch.ones(1))],
    "sparse tensor": torch.eye(2).to_sparse(),
    "module": torch.nn.Linear(1, 1),
    "array of objects": np.array([object()]),
    "file": io.StringIO(),
    "lock": {"lock": threading.Lock()},
    "function": len,
    "default from a user's function": defaultdict(lambda: 0),
    "class": int,
    "object": object(),
    "namespace with an object": SimpleNamespace(a=object()),
    "dataclass with code": Checked(1),
    "dataclass of a function": local_record(),
    "too deep": nested(MAX_DEPTH + 1),
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_other_values_are_not_plain(kind: str) -> None:
    assert not is_plain(NOT_PLAIN[kind])


def test_a_memory_mapped_array_is_not_plain(tmp_path: pathlib.Path) -> None:
    assert not is_plain(mapped(tmp_path / "numbers"))


# ---------------------------------------------------------------------- tensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.complex128, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_survive_packing(dtype: torch.dtype) -> None:
    for shape in ((), (0,), (2, 0), (1,), (2, 3)):
        tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
        back = unpack(pack(tensor))
        assert (back.dtype, back.shape) == (dtype, torch.Size(shape))
        assert back.to(torch.complex128).tolist() == tensor.to(torch.complex128).tolist()


def test_special_floats_keep_their_bits() -> None:
    odd = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45])
    assert torch.equal(unpack(pack(odd)).view(torch.int32), odd.view(torch.int32))


@pytest.mark.parametrize(
    "view",
    [
        torch.arange(6).reshape(2, 3).t(),
        torch.arange(6)[::2],
        torch.arange(3).expand(2, 3),
        torch.arange(8.0).reshape(1, 2, 2, 2).to(memory_format=torch.channels_last),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    ],
    ids=["transposed", "strided", "expanded", "channels last", "conjugate", "negative"],
)
def test_views_are_restored_by_value(view: torch.Tensor) -> None:
    back = unpack(pack(view))
    assert torch.equal(back, view)
    assert back.is_contiguous()


def test_an_unpacked_tensor_is_a_writable_copy() -> None:
    tensor = torch.zeros(2)
    data = pack(tensor)
    tensor.fill_(1)
    back = unpack(data)
    back.add_(5)
    assert back.tolist() == [5.0, 5.0]
    assert unpack(data).tolist() == [0.0, 0.0]


def test_shared_references_stay_shared() -> None:
    tensor = torch.zeros(2)
    first, second = unpack(pack([tensor, tensor]))
    assert first is second


def test_autograd_graphs_are_dropped() -> None:
    back = unpack(pack({"loss": torch.ones(2, requires_grad=True).sum()}))
    assert not back["loss"].requires_grad


def test_packed_scalars_are_small() -> None:
    assert len(pack([torch.tensor(float(i)) for i in range(100)])) < 4000


TENSORS = st.builds(
    lambda values, dtype: torch.tensor(values).to(dtype),
    st.lists(st.floats(-100, 100, width=16), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
ATOMS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), TENSORS)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.lists(inner, max_size=3).map(deque),
    ),
    max_leaves=8,
)


@given(VALUES)
def test_any_plain_value_survives_packing(value: Any) -> None:
    back = unpack(pack(value))
    assert the_same(back, value)
    assert is_plain(back) == is_plain(value)


# ---------------------------------------------------------------------- attributes


class Owner:
    def __init__(self) -> None:
        self.count, self.seen, self.layer = 3, [torch.ones(1)], torch.nn.Linear(1, 1)
        self.base = "base class"


def test_attributes_are_captured_and_restored() -> None:
    owner = Owner()
    saved = plain_attributes(owner, leave={"base"})
    assert set(saved) == {"count", "seen"}
    fresh = Owner()
    fresh.count, fresh.base, layer = 0, "unchanged", fresh.layer
    set_plain_attributes(fresh, saved)
    assert (fresh.count, fresh.base) == (3, "unchanged")
    assert fresh.layer is layer


def test_an_object_without_attributes_has_no_plain_attributes() -> None:
    assert plain_attributes([1, 2]) == {}
    set_plain_attributes([1, 2], {})


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({1}, {1.0}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1: 0}, {True: 0}),
        ([0.0], [-0.0]),
        ({"a": [1]}, {"a": [True]}),
    ],
)
def test_values_that_are_equal_but_not_the_same_are_told_apart(left: Any, right: Any) -> None:
    assert left == right
    assert not is_same(left, right)
    assert is_same(left, deepcopy(left))
