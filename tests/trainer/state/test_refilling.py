"""Saved values are put into the objects that hold such values, and nowhere else."""

from __future__ import annotations

import copy
from array import array
from collections import ChainMap, OrderedDict, UserDict, UserList, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.trainer.state.attribute_reader import AttributeReader
from lightning_ckptless.trainer.state.plain_values import is_same
from lightning_ckptless.trainer.state.refilling import can_be_refilled, refilled


@dataclass
class Record:
    count: int = 0
    seen: list[int] = field(default_factory=list)


class Holder:
    """Anything with attributes."""

    first: Any


def changed(value: Any) -> Any:
    """Return a value of the same kind with other contents."""
    other = copy.deepcopy(value)
    if isinstance(other, torch.Tensor):
        return other + 1
    if isinstance(other, list | UserList | deque | bytearray | array):
        other.append(7)
    elif isinstance(other, dict | UserDict | ChainMap):
        other["b"] = other.pop("a")
    elif isinstance(other, set):
        other.add(7)
    elif isinstance(other, np.ndarray):
        other[0] += 1
    else:
        other.count, other.seen = 5, [1, 2]
    return other


REFILLABLE = [
    [1, 2], {"a": 1, "c": 2}, OrderedDict(a=1, c=2), {1}, deque([1], maxlen=2), bytearray(b"a"), torch.zeros(2),
    np.zeros(2), np.array([1, None], dtype=object), array("i", [1]), UserDict(a=1), UserList([1]), ChainMap({"a": 1}),
    SimpleNamespace(count=1), Record(),
]  # fmt: skip


@pytest.mark.parametrize("value", REFILLABLE, ids=lambda value: type(value).__name__)
def test_the_object_stays(value: Any) -> None:
    assert can_be_refilled(value)
    there, saved = copy.deepcopy(value), changed(value)
    found = refilled({"first": there}, {"first": copy.deepcopy(saved)})
    assert found["first"] is there
    assert is_same(found["first"], saved)


OTHERS = [
    ([1], (1,)), (torch.zeros(2), torch.zeros(3)), (torch.zeros(2), torch.zeros(2, dtype=torch.int8)),
    (torch.zeros(1).expand(3), torch.ones(3)), (np.zeros(2), np.zeros(3)), (deque([1]), deque([1], maxlen=3)),
    (array("i", [1]), array("d", [1])),
    (None, [1]), ([1], None),
]  # fmt: skip


@pytest.mark.parametrize(("there", "saved"), OTHERS, ids=str)
def test_a_value_of_another_kind_replaces_the_object(there: Any, saved: Any) -> None:
    assert refilled({"first": there}, {"first": saved})["first"] is saved


def test_parts_of_several_values_stay_parts_of_them() -> None:
    inner: list[int] = []
    there: dict[str, Any] = {"first": inner, "second": {"a": inner, "b": (inner, 1)}}
    found = refilled(there, unpack(pack({"first": (part := [1]), "second": {"a": part, "b": (part, 1)}})))
    assert found["second"] is there["second"] and found["first"] is inner
    assert found["second"]["a"] is inner and found["second"]["b"][0] is inner and inner == [1]


def test_tensors_of_a_list_that_have_their_values_already_stay() -> None:
    """They may share their memory with parameters."""
    weight = torch.nn.Parameter(torch.ones(2))
    there = {"first": [weight.data, torch.zeros(1)]}
    found = refilled(there, unpack(pack({"first": [torch.ones(2), torch.ones(1)]})))["first"]
    with torch.no_grad():
        weight.add_(1)
    assert found[0].tolist() == [2.0, 2.0] and found[1].tolist() == [1.0]


TREES = st.recursive(st.integers(0, 3), lambda inner: st.lists(inner, max_size=3) | st.fixed_dictionaries({"a": inner}))


@given(st.dictionaries(st.sampled_from("abc"), TREES), st.dictionaries(st.sampled_from("abc"), TREES))
def test_the_values_are_those_saved(there: Any, saved: Any) -> None:
    assert is_same(refilled(there, copy.deepcopy(saved)), saved)


# ---------------------------------------------------------------------- the attributes of an object


def restored(owner: Any, reader: AttributeReader, disturb: Any) -> None:
    """Capture, disturb, and restore."""
    plain = unpack(pack(reader.plain()))
    held, others = reader.held, reader.others
    disturb()
    reader.put(plain, held, others)


def test_an_attribute_that_was_never_replaced_stays_the_same_object() -> None:
    owner = Holder()
    owner.first = seen = [0]
    reader = AttributeReader(owner)
    seen.append(1)
    restored(owner, reader, lambda: seen.append(2))
    assert owner.first is seen and seen == [0, 1]


def test_an_attribute_that_was_replaced_is_replaced() -> None:
    """Its present object may be anything: a batch that is about to be replayed, for example."""
    owner, batch = Holder(), {"x": 2}
    owner.first = {"x": 0}
    reader = AttributeReader(owner)
    owner.first = {"x": 1}
    restored(owner, reader, lambda: vars(owner).update(first=batch))
    assert owner.first == {"x": 1} and batch == {"x": 2}


def test_an_attribute_that_was_replaced_since_is_the_former_object_again() -> None:
    owner, batch = Holder(), {"x": 2}
    owner.first = first = {"x": 0}
    restored(owner, AttributeReader(owner), lambda: vars(owner).update(first=batch))
    assert owner.first is first and first == {"x": 0} and batch == {"x": 2}


def test_an_attribute_that_was_made_later_is_removed() -> None:
    owner = Holder()
    owner.first, owner.model = 1, torch.nn.Linear(1, 1)  # type: ignore[attr-defined]
    reader = AttributeReader(owner)
    restored(owner, reader, lambda: vars(owner).update(later=3, first=2, model=4))
    assert vars(owner) == {"first": 1, "model": 4}


def test_a_list_of_objects_that_has_changed_is_told_once() -> None:
    told: list[str] = []
    owner = Holder()
    owner.first, owner.weights = [], [torch.nn.Parameter(torch.ones(1))]  # type: ignore[attr-defined]
    reader = AttributeReader(owner, tell=told.append)
    reader.plain()
    owner.weights = owner.weights[:]  # type: ignore[attr-defined]
    for number in range(2):
        owner.first.append(Holder())
        setattr(owner, f"made_{number}", number)
        reader.plain()
    assert told == ["first"]
