"""Captures attributes that changed since their objects were first seen, and restores them on the same objects.

The cost per step is bounded. Numbers, text, small containers and small arrays are compared by value, tensors and those
in a list or dictionary by their write counters, everything else by identity and length.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.internals.torch_internals import version_counter
from lightning_ckptless.trainer.state.attribute_snapshot import UNKNOWN, AttributeSnapshot, quiet_of
from lightning_ckptless.trainer.state.object_attributes import attributes_of
from lightning_ckptless.trainer.state.plain_values import is_same, measure
from lightning_ckptless.trainer.state.refilling import refilled
from lightning_ckptless.trainer.state.watch import Watched

Changed = dict[str, dict[str, dict[str, Any]]]
"""By object path: changed values under `set`, names of deleted attributes under `gone`."""

COMPARED_BYTES = 65_536
"""Largest value that is compared in full."""
KEPT_BYTES = 8_000_000
"""Largest tensor, array, or list or dictionary of tensors that is captured when it changes. Other values are limited to
`COMPARED_BYTES`."""
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})
_ABSENT = object()
_SEEN = attrgetter("seen")


class Size(Enum):
    """Whether a value can be captured."""

    FITS = "captured"
    LARGE = "plain data, too large to capture"
    UNKNOWN = "not plain data"


@dataclass(frozen=True, slots=True)
class Policy:
    """How changed attributes are handled.

    Args:
        captures_plain: whether plain values are captured and restored.
        restores_objects: whether an attribute that now refers to a different object gets its original object back.
        names: kinds of values whose changes are reported as lost when they are not captured.
    """

    captures_plain: bool = True
    restores_objects: bool = True
    names: frozenset[Size] = frozenset(Size)


EVERYTHING = Policy()
SETTINGS = Policy(restores_objects=False, names=frozenset())
OBJECTS_LEFT_ALONE = Policy(restores_objects=False)
NAMED_ONLY = Policy(captures_plain=False, restores_objects=False)


class Changes:
    """Tracks changes to the attributes of a set of objects.

    Args:
        owners: the objects by path. Equivalent objects in different processes have the same path.
        leave: names of attributes to ignore, by path.
        policy: how changed attributes are handled.
        earlier: an observation of some of these objects from before hooks that a new process does not run.
    """

    def __init__(
        self,
        owners: Iterable[tuple[str, Any]],
        leave: Mapping[str, Collection[str]] | None = None,
        *,
        policy: Policy = EVERYTHING,
        earlier: Changes | None = None,
    ) -> None:
        left = leave or {}
        known = {} if earlier is None else {id(owner.owner()): owner for owner in earlier._owners.values()}
        for owner in known.values():
            owner.accept_objects()
        self._owners: dict[str, _Owner] = {
            path: known.get(id(owner)) or _Owner(owner, frozenset(left.get(path, ())), policy) for path, owner in owners
        }
        self._captured: Changed = {}
        self._quiet = UNKNOWN

    @property
    def watched(self) -> Collection[Watched]:
        """The objects, for a watch."""
        return self._owners.values()

    def capture(self) -> Changed:
        """Return copies of everything that differs from the first observation. See `lost` for what is not captured."""
        if not self._quiet.is_now:
            self._quiet = quiet_of(map(_SEEN, self._owners.values()))
        if not self._quiet.is_now:
            self._captured = {path: changed for path, owner in self._owners.items() if (changed := owner.changed())}
        return self._captured

    def apply(self, saved: Changed, *, only: str | None = None) -> None:
        """Restore the objects to a state captured here or in another process.

        Args:
            saved: the result of `capture`.
            only: path of the only object to restore; None for all.
        """
        for path, owner in self._owners.items():
            if only in (None, path):
                owner.put(saved.get(path, {}))

    def identities(self) -> set[int]:
        """Return the identities of the watched objects."""
        return {id(owner.owner()) for owner in self._owners.values()}

    def lost(self) -> list[str]:
        """Return, once each, the attributes whose change `capture` saw but could not save, as `path.name`."""
        found = [f"{path}.{name}" for path, owner in self._owners.items() for name in owner.lost]
        for owner in self._owners.values() if found else ():
            owner.lost.clear()
        return found


class _Owner:
    """One object with the original values of its attributes.

    Attributes:
        owner: returns the object; None if it no longer exists. The reference is weak, since the object may hold this
            one, unless it has no `__dict__` or other parts too.
        is_usual: whether the object consists of its `__dict__`.
        seen: the attributes that are not marked, as of the last look.
        lost: names whose change could not be captured.
    """

    def __init__(self, owner: Any, leave: frozenset[str], policy: Policy) -> None:
        attributes = attributes_of(owner)
        self.is_usual = bool(hasattr(owner, "__dict__") and attributes is vars(owner) and type(owner).__weakrefoffset__)
        self._parts = None if self.is_usual else attributes
        self.owner: Callable[[], Any] = weakref.ref(owner) if self.is_usual else lambda: owner
        self._leave = leave
        self._policy = policy
        self._first = {name: _Value(value) for name, value in attributes.items() if name not in leave}
        self._marked = {name: first for name, first in self._first.items() if first.is_marked}
        self.seen = AttributeSnapshot(leave | self._marked.keys())
        self._changed: dict[str, Any] = {}
        self._is_known = False
        self.lost: list[str] = []

    @property
    def has_marks(self) -> bool:
        """See `watch.Watched`."""
        return bool(self._marked)

    def is_as_marked(self) -> bool:
        """See `watch.Watched`."""
        attributes = self._attributes
        return attributes is not None and self._is_known and self._are_unchanged(attributes)

    def _are_unchanged(self, attributes: Mapping[str, Any]) -> bool:
        return all(first.is_unchanged(attributes.get(name)) for name, first in self._marked.items())

    @property
    def _attributes(self) -> MutableMapping[str, Any] | None:
        if self._parts is not None:
            return self._parts
        owner = self.owner()
        return None if owner is None else vars(owner)

    def accept_objects(self) -> None:
        """Take what cannot be captured as it is now, not as it was at the first observation."""
        attributes = self._attributes or {}
        for name in list(self._differing(attributes)):
            if name in attributes and _size(attributes[name]) is not Size.FITS:
                self._first[name] = _Value(attributes[name])
        self._marked = {name: first for name, first in self._first.items() if first.is_marked}
        self.seen = AttributeSnapshot(self._leave | self._marked.keys())

    def changed(self) -> dict[str, Any]:
        """Return what differs from the original attributes; the same object as at the last call if nothing changed."""
        if self.seen.is_quiet:
            return self._changed
        attributes = self._attributes
        if attributes is None:
            return {}
        names = self.seen.look(attributes)
        is_same = self._is_known and names is not None and not names
        if is_same and (not self._marked or self._are_unchanged(attributes)):
            return self._changed
        self._changed = self._find(attributes)
        # A marked value that has changed may change again in a way that its mark does not show.
        self._is_known = self._are_unchanged(attributes)
        return self._changed

    def _find(self, attributes: MutableMapping[str, Any]) -> dict[str, Any]:
        changed, gone = {}, []
        for name in self._differing(attributes):
            value = attributes.get(name, _ABSENT)
            size = Size.FITS if value is _ABSENT else _size(value)
            if size is not Size.FITS or not self._policy.captures_plain:
                if size in self._policy.names:
                    # Reported once, then ignored.
                    self.lost.append(name)
                    self._leave |= {name}
                    self._marked.pop(name, None)
                    self.seen = AttributeSnapshot(self._leave | self._marked.keys())
            elif value is _ABSENT:
                gone.append(name)
            else:
                changed[name] = _copied(value)
        if not changed and not gone:
            return {}
        return {"set": changed, "gone": dict.fromkeys(gone)}

    def put(self, saved: dict[str, Any]) -> None:
        """Make the object differ from its original state by exactly what was saved."""
        values, gone = saved.get("set", {}), saved.get("gone", {})
        attributes = self._attributes
        if attributes is None:
            return
        for name in {*self._differing(attributes), *values, *gone}:
            if name in values:
                _put(attributes, name, _copied(values[name]))
            elif not self._policy.restores_objects and _size(attributes.get(name)) is Size.UNKNOWN:
                continue
            elif name in gone or name not in self._first:
                attributes.pop(name, None)
            else:
                self._first[name].put_into(attributes, name)

    def _differing(self, attributes: MutableMapping[str, Any]) -> Iterator[str]:
        """Yield the names of attributes that differ from their original values."""
        for name in {**self._first, **attributes}:
            if name in self._leave:
                continue
            first, value = self._first.get(name), attributes.get(name, _ABSENT)
            if first is None or value is _ABSENT or not first.is_unchanged(value):
                yield name


class _Value:
    """The original value of an attribute.

    Attributes:
        is_marked: whether it is compared by identity and a fingerprint: tensors, or a container that is not captured.
    """

    def __init__(self, value: Any) -> None:
        self._object = value
        self._copy: Any = _ABSENT
        self._mark: Any = None
        self._parts: tuple[Any, ...] = ()
        self.is_marked = False
        if type(value) in _ATOMS:
            return
        fits = _size(value) is Size.FITS
        if fits:
            self._copy = _copied(value)
        has_mark = isinstance(value, torch.Tensor) or not fits or _is_large_array(value) or _are_tensors(value)
        if has_mark:
            self._set_mark(value, fits=fits)
        is_container = isinstance(value, tuple | frozenset | deque)
        self.is_marked = has_mark and (is_container or _mark(value) != 0)

    def _set_mark(self, value: Any, *, fits: bool) -> None:
        self._mark = _mark(value)
        # Held, so that no other tensor takes their identities; not if they are many megabytes.
        self._parts = _items(value) if fits and _are_tensors(value) else ()

    def is_unchanged(self, value: Any) -> bool:
        """Return whether a value equals the original."""
        if self._mark is not None:
            return value is self._object and _mark(value) == self._mark
        if self._copy is _ABSENT:
            return value is self._object or (type(value) is type(self._object) and bool(value == self._object))
        return _equal(value, self._copy)

    def put_into(self, attributes: MutableMapping[str, Any], name: str) -> None:
        """Restore the attribute to its original value."""
        attributes[name] = self._object
        if self._copy is not _ABSENT:
            _put(attributes, name, _copied(self._copy))
        if self._mark is not None:
            self._set_mark(self._object, fits=self._copy is not _ABSENT)


def _size(value: Any) -> Size:
    limit = KEPT_BYTES if isinstance(value, torch.Tensor | np.ndarray) or _are_tensors(value) else COMPARED_BYTES
    size = measure(value, limit)
    return Size.UNKNOWN if size is None else Size.FITS if size <= limit else Size.LARGE


def _is_large_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.nbytes > COMPARED_BYTES


def _mark(value: Any) -> Any:
    """Return a fingerprint of a value too large to compare in full; 0 for objects without one."""
    if isinstance(value, torch.Tensor):
        return version_counter(value), value.shape
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype
    if _are_tensors(value):
        return [(id(tensor), version_counter(tensor)) for tensor in _items(value)]
    return len(value) if isinstance(value, list | dict | set) else 0


def _are_tensors(value: Any) -> bool:
    """Return whether a value is a list, tuple or dictionary of tensors, such as the averages of a model's weights."""
    if not isinstance(value, dict | list | tuple) or not value:
        return False
    return all(isinstance(part, torch.Tensor) for part in (value.values() if isinstance(value, dict) else value))


def _items(value: Any) -> tuple[Any, ...]:
    return tuple(value.values() if isinstance(value, dict) else value)


def _copied(value: Any) -> Any:
    if type(value) in _ATOMS:
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (dict, list, tuple) and _are_tensors(value) and all(map(_is_plain_tensor, _items(value))):
        return _with_cloned_tensors(value)
    # `copy` refuses tensors with an autograd graph.
    return unpack(pack(value))


def _is_plain_tensor(value: Any) -> bool:
    return type(value) is torch.Tensor and value.layout is torch.strided and not value.is_quantized


def _with_cloned_tensors(value: Any) -> Any:
    """Return what `unpack(pack(value))` would, without the bytes in between: a dataset may be many megabytes."""
    clones: dict[int, torch.Tensor] = {}
    for tensor in _items(value):
        if id(tensor) not in clones:
            plain = tensor.detach().resolve_conj().resolve_neg()
            clones[id(tensor)] = plain.clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: clones[id(tensor)] for key, tensor in value.items()}
    return type(value)(clones[id(tensor)] for tensor in value)


def _equal(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray) and not left.dtype.hasobject:
        return bool(left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes())
    try:
        # About 100 times faster for containers of numbers and text.
        return bool(left == right)
    except (RuntimeError, ValueError, TypeError):
        # It contains tensors or arrays.
        return is_same(left, right)


def _put(attributes: MutableMapping[str, Any], name: str, value: Any) -> None:
    """Set an attribute, in place where possible: other code may hold a reference to the current object."""
    held = {name: attributes[name]} if name in attributes else {}
    attributes[name] = refilled(held, {name: value})[name]
