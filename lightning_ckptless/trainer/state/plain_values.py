"""Plain values: attributes that users keep on their modules and callbacks.

A counter in a `LightningModule`, a list of validation outputs, a callback's best score: none of them is in a
`state_dict`, and all of them affect how training continues. Plain values are captured; other objects (open files,
threads, modules) are not.
"""

from __future__ import annotations

import datetime as dt
import enum
import pathlib
import struct
from argparse import Namespace
from array import array
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, UserString, defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from functools import cache
from itertools import chain, count
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import numpy as np
import torch

from lightning_ckptless.formats.packing import pack
from lightning_ckptless.formats.pickles import found_in_program, is_record_class

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, bytearray, Decimal, Fraction, UUID, enum.Enum, pathlib.PurePath,
    dt.timedelta, dt.date, dt.time, dt.timezone, range, array, count, np.generic, torch.dtype, torch.device,
)  # fmt: skip
_COMMON = frozenset({type(None), bool, int, float, str})
_SEQUENCES = (list, tuple, set, frozenset, deque, torch.Size)
_MAPPINGS = (dict, OrderedDict, Counter)
NAMESPACES = (SimpleNamespace, Namespace, UserDict, UserList, UserString, ChainMap)
"""Classes of the standard library whose instances are what their attributes are."""
_EXAMPLES: tuple[Any, ...] = (
    range(1), range(1 << 70), [1], (1,), "a", b"a", bytearray(b"a"), {1}, {1: 1}, {1: 1}.values(), {1: 1}.items(),
)  # fmt: skip
ITERATORS = (*(type(iter(example)) for example in _EXAMPLES), type(reversed([1])), reversed, zip, enumerate)
"""Classes of iterators that can be copied together with the data that they iterate over."""
_IN_PARTS = (slice, *ITERATORS)
_FACTORIES = (None, int, float, str, list, dict, set, Counter)
MAX_DEPTH = 10
HEAVY_BYTES = 8_000_000
"""A larger value is too expensive to be mirrored or stored with every version."""


def is_plain(value: Any, depth: int = 0) -> bool:
    """Return whether a value consists of numbers, strings, arrays, tensors, and containers and records of these."""
    if type(value) in _COMMON:
        return True
    if isinstance(value, torch.Tensor):
        return _is_plain_tensor(value)
    if isinstance(value, np.ndarray):
        # A memory-mapped file is input data, not state.
        if not value.dtype.hasobject:
            return not isinstance(value, np.memmap)
        return type(value) is np.ndarray and is_plain(value.ravel().tolist(), depth)
    if isinstance(value, _ATOMS):
        return True
    if depth >= MAX_DEPTH:
        return False
    # Without a call for the most common ones.
    parts = value if type(value) in _SEQUENCES else _parts(value)
    return parts is not None and all(is_plain(part, depth + 1) for part in parts)


def _parts(value: Any) -> Iterable[Any] | None:
    """Return what a container, record, slice or iterator consists of; None for anything else."""
    if type(value) in _SEQUENCES:
        return value  # type: ignore[no-any-return]
    if _is_mapping(value):
        return chain(value.keys(), value.values())
    if type(value) in _IN_PARTS:
        return value.__reduce__()[1]  # type: ignore[no-any-return]
    return contents(value).values() if is_record(value) else None


def is_record(value: Any) -> bool:
    """Return whether a value is like a namespace, a named tuple, or a dataclass instance without code of its own."""
    kind: Any = type(value)
    return kind in NAMESPACES or _is_known_record_class(kind)


@cache
def _is_known_record_class(kind: type) -> bool:
    # A class that is local to a function cannot be found by a new process.
    return is_record_class(kind) and found_in_program(kind.__module__, kind.__qualname__) is kind


def contents(record: Any) -> dict[str, Any]:
    """Return the values of a namespace, named tuple or dataclass by name."""
    if isinstance(record, tuple):
        kind: Any = type(record)
        return dict(zip(kind.__match_args__, record, strict=True))
    if hasattr(record, "__dict__"):
        return dict(vars(record))
    return {field.name: getattr(record, field.name) for field in fields(record) if hasattr(record, field.name)}


def _is_plain_tensor(value: torch.Tensor) -> bool:
    # A leaf that requires gradients is a parameter whatever its class: an optimizer may hold this object.
    return value.layout is torch.strided and not (value.is_leaf and value.requires_grad)


def plain_attributes(owner: object, *, leave: Collection[str] = ()) -> dict[str, Any]:
    """Return the attributes of an object that are plain values.

    Args:
        owner: a module, callback, datamodule or sampler.
        leave: names to exclude.
    """
    return {
        name: value for name, value in getattr(owner, "__dict__", {}).items() if name not in leave and is_plain(value)
    }


def heavy_attributes(owner: object, limit_bytes: int, *, leave: Collection[str] = ()) -> tuple[str, ...]:
    """Return names of plain attributes too large to mirror with every step, e.g. an in-memory dataset.

    Args:
        owner: a module, callback, datamodule or sampler.
        limit_bytes: size from which an attribute is too large.
        leave: names to exclude.
    """
    return tuple(
        name
        for name, value in getattr(owner, "__dict__", {}).items()
        if name not in leave and (size := measure(value, limit_bytes)) is not None and size > limit_bytes
    )


def measure(value: Any, limit_bytes: int, depth: int = 0) -> int | None:
    """Return the approximate size of a plain value in bytes; None if it is not plain.

    Args:
        value: the value.
        limit_bytes: stop counting beyond this size, without looking at the rest.
        depth: number of containers around the value.
    """
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    if isinstance(value, torch.Tensor | np.ndarray):
        return int(value.nbytes) if is_plain(value) else None
    if isinstance(value, array):
        return len(value) * value.itemsize
    if isinstance(value, _ATOMS):
        return 8
    if depth >= MAX_DEPTH or (parts := _parts(value)) is None:
        return None
    total = 0
    for part in parts:
        if (size := measure(part, limit_bytes - total, depth + 1)) is None:
            return None
        total += 8 + size
        if total > limit_bytes:
            break
    return total


def _is_mapping(value: Any) -> bool:
    return type(value) in _MAPPINGS or (type(value) is defaultdict and value.default_factory in _FACTORIES)


def set_plain_attributes(owner: object, saved: dict[str, Any]) -> None:
    """Restore saved attributes. An object that has its value keeps it: others may refer to the same object."""
    if not saved:
        # It may have no attributes at all.
        return
    attributes = vars(owner)
    for name, value in saved.items():
        if name not in attributes or not is_same(attributes[name], value):
            attributes[name] = value


def is_same(left: Any, right: Any) -> bool:
    """Return whether two host state values are equal in type and bit for bit in value."""
    if left is right:
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        # In order, which is part of the value.
        return len(left) == len(right) and all(map(is_same, [*left, *left.values()], [*right, *right.values()]))
    if isinstance(left, list | tuple | deque):
        return len(left) == len(right) and all(map(is_same, left, right))
    if isinstance(left, set | frozenset):
        return {(type(item), item) for item in left} == {(type(item), item) for item in right}
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right)
    return pack(left) == pack(right)
