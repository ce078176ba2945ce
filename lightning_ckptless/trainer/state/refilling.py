"""Puts saved values into the objects that hold such values, instead of replacing these objects.

A list may be known to more than the attribute that holds it: to the closure of a hook, to a layer, to a callback. A
tensor may share its memory with a buffer or an array. A value that was replaced would leave them behind.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, UserString, defaultdict, deque
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch

from lightning_ckptless.trainer.state.plain_values import NAMESPACES, contents, is_same

_MAPPINGS = (dict, OrderedDict, Counter, defaultdict)
_CONTAINERS = (*_MAPPINGS, list, set, deque, bytearray, array)


def can_be_refilled(value: Any) -> bool:
    """Return whether a plain value is an object that can be given another value."""
    if isinstance(value, torch.Tensor):
        overlaps = any(step == 0 < size - 1 for step, size in zip(value.stride(), value.shape, strict=True))
        return not (overlaps or value.requires_grad or value.is_inference())
    if isinstance(value, np.ndarray):
        return type(value) is np.ndarray and value.flags.writeable
    return type(value) in _CONTAINERS or is_mutable_record(value)


def is_mutable_record(value: Any) -> bool:
    """Return whether a value is like a namespace, or an instance of a dataclass that is not frozen."""
    if type(value) in NAMESPACES:
        return type(value) is not UserString
    return is_dataclass(value) and not getattr(type(value), "__dataclass_params__").frozen  # noqa: B009


def refilled(held: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved values by name, as the objects that hold such values where there are any.

    Args:
        held: objects by name, given the saved value of the same name if it is of the same kind.
        saved: the values, which may be changed. A value that is part of several is one object.
    """
    alike = [name for name, there in held.items() if name in saved and _is_alike(there, saved[name])]
    known = {id(saved[name]): held[name] for name in alike}
    found = {name: value if id(value) in known else _with(known, value, None) for name, value in saved.items()}
    for name in alike:
        _fill(held[name], _with(known, saved[name], held[name]))
    return {name: known.get(id(value), value) for name, value in found.items()}


def _is_alike(there: Any, value: Any) -> bool:
    if type(there) is not type(value) or not can_be_refilled(there):
        return False
    if isinstance(there, torch.Tensor):
        return (there.dtype, there.shape, there.device) == (value.dtype, value.shape, value.device)
    if isinstance(there, np.ndarray):
        return (there.dtype, there.shape) == (value.dtype, value.shape)
    if isinstance(there, array):
        return bool(there.typecode == value.typecode)
    return not isinstance(there, deque) or there.maxlen == value.maxlen


def _with(known: Mapping[int, Any], value: Any, there: Any) -> Any:
    """Return a value with the parts replaced that are held elsewhere.

    Args:
        known: the objects to be used, by the identity of the parts.
        value: the value.
        there: the object that is given this value, if any. A tensor in it that has its value already is kept: it may
            share its memory with a parameter, which has been restored.
    """

    def part(inner: Any, other: Any) -> Any:
        if id(inner) in known:
            return known[id(inner)]
        if isinstance(inner, torch.Tensor) and isinstance(other, torch.Tensor) and is_same(inner, other):
            return other
        return _with(known, inner, other)

    others = there if type(there) is type(value) else ()
    if isinstance(value, list | deque):
        for index, inner in enumerate(value):
            value[index] = part(inner, others[index] if index < len(others) else None)
    elif isinstance(value, dict):
        for key, inner in value.items():
            value[key] = part(inner, others.get(key) if isinstance(others, dict) else None)
    elif type(value) is tuple:
        parts = tuple(part(inner, others[at] if at < len(others) else None) for at, inner in enumerate(value))
        return value if all(new is old for new, old in zip(parts, value, strict=True)) else parts
    elif is_mutable_record(value):
        for name, inner in contents(value).items():
            setattr(value, name, part(inner, getattr(others, name, None)))
    return value


def _fill(there: Any, value: Any) -> None:
    if isinstance(there, torch.Tensor):
        with torch.no_grad():
            there.copy_(value)
    elif isinstance(there, np.ndarray):
        there[...] = value
    elif isinstance(there, list | bytearray | array):
        there[:] = value
    elif isinstance(there, dict | set):
        there.clear()
        there.update(value)
    elif isinstance(there, deque):
        there.clear()
        there.extend(value)
    else:
        for name in contents(there).keys() - contents(value).keys():
            delattr(there, name)
        for name, inner in contents(value).items():
            setattr(there, name, inner)
