"""Tells cheaply whether the plain attributes of an object are as they were when they were last read.

An object has dozens of attributes, of which few ever change. Numbers and text are immutable, so the same object means
the same value. So it does for objects that are not plain values, since these are not captured. Only containers can
change without being replaced: those of numbers and text are serialized for the comparison, and of those that hold other
objects the items are compared by identity. If an attribute may change in a way that neither shows, such as a tensor,
the answer is always that something may have changed.
"""

from __future__ import annotations

import marshal
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum, auto
from itertools import count
from operator import is_, itemgetter
from typing import Any

import numpy as np
import torch

from lightning_ckptless.trainer.state.plain_values import ITERATORS, MAX_DEPTH, contents, is_record

_EXACT = frozenset({type(None), bool, int, float, complex, str})
"""Classes that `marshal` writes differently for different values. Arrays and bytes it does not tell apart."""
_SERIALIZED = frozenset({list, tuple, dict, set, frozenset})
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_BASIC = (int, float, complex, str, bytes)
_MUTABLE_DATA: tuple[Any, ...] = (torch.Tensor, np.ndarray, bytearray, array, count, *ITERATORS)


class _Kind(Enum):
    FIXED = auto()
    SERIALIZED = auto()
    ITEMS = auto()
    UNKNOWN = auto()


class Quiet:
    """Says of many objects at once whether nothing has changed since the last look at any of them; see `watch.py`.

    Attributes:
        is_now: whether this is known.
    """

    def __init__(self) -> None:
        self.is_now = False


UNKNOWN = Quiet()
"""That of objects which no watch compares."""


def quiet_of(every: Iterable[AttributeSnapshot]) -> Quiet:
    """Return what says whether nothing has changed in all of some objects."""
    found = {seen.quiet for seen in every}
    return found.pop() if len(found) == 1 else UNKNOWN


class AttributeSnapshot:
    """The attributes of one object as they were at the last look.

    Args:
        leave: names of attributes that are not looked at.

    Attributes:
        names: all names, in order; None before the first look.
        kept: those that are looked at.
        values: their values.
        serialized: the containers of numbers and text.
        bytes: what `marshal` writes for these.
        items: the other containers, each with its items.
        unknown: names of attributes that may change in a way that does not show.
        changes: number of looks that have found a change.
        quiet: says whether nothing has changed since the last look.
    """

    def __init__(self, leave: Collection[str] = ()) -> None:
        self._leave = leave
        self.names: tuple[str, ...] | None = None
        self.kept: list[str] = []
        self._pick: Callable[[Mapping[str, Any]], tuple[Any, ...]] = _picker([])
        self.values: tuple[Any, ...] = ()
        self._kinds: dict[str, _Kind] = {}
        self.unknown: list[str] = []
        self.serialized: dict[str, Any] = {}
        self.bytes = b""
        self.items: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        self.changes = 0
        self.quiet = UNKNOWN

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has changed since the last look, as far as that is known."""
        return self.quiet.is_now

    def look(self, attributes: Mapping[str, Any]) -> Collection[str] | None:
        """Look at the attributes.

        Returns:
            Names of attributes that may have changed since the last look; all others are certain to be the same. None
            if attributes have come or gone.
        """
        if tuple(attributes) != self.names:
            self.names = tuple(attributes)
            self.kept = [name for name in attributes if name not in self._leave]
            self._pick = _picker(self.kept)
            self.values = self._pick(attributes)
            self._classify(self.kept)
            self.changes += 1
            return None
        before, self.values = self.values, self._pick(attributes)
        changed = list(self.unknown)
        if not all(map(is_, before, self.values)):
            changed += [name for name, old, new in zip(self.kept, before, self.values, strict=True) if old is not new]
        if self.serialized and self.bytes != _serialized(self.serialized):
            changed += self.serialized
        if self.items:
            changed += [name for name, (value, items) in self.items.items() if not has_items(value, items)]
        if changed:
            self._classify(changed)
            self.changes += 1
        return changed

    def _classify(self, names: Collection[str]) -> None:
        values = dict(zip(self.kept, self.values, strict=True))
        kinds = {name: _kind_of(values[name]) for name in names}
        moved = [name for name, kind in kinds.items() if kind is not _Kind.FIXED or self._kinds.get(name) is not kind]
        self._kinds = {name: self._kinds[name] for name in self.kept if name in self._kinds} | kinds
        if not moved and len(kinds) < len(self.kept):
            return
        by_kind: dict[_Kind, list[str]] = {kind: [] for kind in _Kind}
        for name, kind in self._kinds.items():
            by_kind[kind].append(name)
        self.unknown = by_kind[_Kind.UNKNOWN]
        self.serialized = {name: values[name] for name in by_kind[_Kind.SERIALIZED]}
        self.bytes = _serialized(self.serialized)
        self.items = {name: (values[name], items_of(values[name])) for name in by_kind[_Kind.ITEMS]}


def _picker(names: list[str]) -> Any:
    if len(names) > 1:
        return itemgetter(*names)
    return (lambda attributes: (attributes[names[0]],)) if names else lambda _: ()


def _serialized(values: Mapping[str, Any]) -> bytes:
    try:
        return marshal.dumps(list(values.values()))
    except ValueError:
        # By now one of them holds something else.
        return b""


def _kind_of(value: Any) -> _Kind:
    kind = type(value)
    if kind in _EXACT:
        return _Kind.FIXED
    if isinstance(value, CONTAINERS) or is_record(value):
        if _is_serialized(value):
            return _Kind.SERIALIZED
        parts = items_of(value)
        is_flat = not any(isinstance(part, CONTAINERS) for part in parts)
        is_flat = is_flat and all(_kind_of(part) is _Kind.FIXED for part in parts)
        return _Kind.ITEMS if is_flat else _Kind.UNKNOWN
    is_derived = isinstance(value, _BASIC) and not isinstance(value, Enum | np.generic)
    # An object of a class derived from `int` may have attributes of its own.
    is_mutable = isinstance(value, _MUTABLE_DATA) or (is_derived and hasattr(value, "__dict__"))
    return _Kind.UNKNOWN if is_mutable else _Kind.FIXED


def _is_serialized(value: Any, depth: int = 0) -> bool:
    if type(value) not in _SERIALIZED or depth >= MAX_DEPTH:
        return False
    parts = items_of(value)
    kinds = set(map(type, parts)) - _EXACT
    return kinds <= _SERIALIZED and all(_is_serialized(part, depth + 1) for part in parts if type(part) in kinds)


def items_of(value: Any) -> tuple[Any, ...]:
    """Return the items of a container or record; of a mapping, the keys and the values."""
    if is_record(value):
        value = contents(value)
    if isinstance(value, dict):
        # A class of the script may have methods of its own.
        base = OrderedDict if isinstance(value, OrderedDict) else dict
        return (*base.keys(value), *base.values(value))
    return tuple(value)


def has_items(value: Any, items: tuple[Any, ...]) -> bool:
    """Return whether a container still consists of the same objects."""
    now = items_of(value)
    return len(now) == len(items) and all(map(is_, now, items))
