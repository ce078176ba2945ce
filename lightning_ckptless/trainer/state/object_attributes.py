"""What an object consists of, as one mapping that can be read and written.

For most objects that is their `__dict__`. The mapping of other objects also has their slots, the items of a container
whose class the script derived, the variables of a function's closure, the arguments of a partial function, and the
variables of a class.
"""

from __future__ import annotations

import functools
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, MutableMapping
from types import CellType, FunctionType, MemberDescriptorType
from typing import Any

from lightning_ckptless.trainer.state.plain_values import is_plain

ITEMS = "[]"
"""Name of the items of a container."""
MOST_ITEMS = 4096
"""A container with more items is data."""
_EXACT = (list, dict, set, deque, OrderedDict, Counter)
_ABSENT = object()


def attributes_of(owner: Any) -> MutableMapping[str, Any]:
    """Return what an object consists of: its `__dict__` itself if that is all.

    The items of a container are a copy, and are included if they are plain values now.
    """
    if isinstance(owner, type):
        return _OfClass(owner)
    if isinstance(owner, FunctionType):
        return _Parts(owner, _cells_of(owner) | {"defaults": _Slot("__defaults__")})
    if isinstance(owner, functools.partial):
        return _Parts(owner, {"arguments": _Arguments(), "keywords": _Keywords()})
    parts: dict[str, _Part] = {name: _Slot(name) for name in _slots_of(_class_of(owner))}
    if has_plain_items(owner):
        parts[ITEMS] = _Items()
    return _Parts(owner, parts) if parts or not hasattr(owner, "__dict__") else vars(owner)


def consists_of_parts(owner: Any) -> bool:
    """Return whether an object that has no `__dict__`, or not only that, can be read and written."""
    if isinstance(owner, FunctionType):
        changing = any(isinstance(default, list | dict | set | deque) for default in owner.__defaults__ or ())
        return bool(owner.__closure__ or owner.__dict__ or changing)
    if isinstance(owner, functools.partial):
        return bool(owner.args or owner.keywords)
    return is_derived_container(owner) or bool(_slots_of(_class_of(owner)))


def is_derived_container(value: Any) -> bool:
    """Return whether a value is of a class derived from a container that can be changed."""
    return isinstance(value, list | dict | set | deque) and type(value) not in _EXACT


def has_plain_items(value: Any) -> bool:
    """Return whether a value is of such a class and its items are plain values."""
    return is_derived_container(value) and is_plain(_Items().get(value))


def _class_of(owner: Any) -> Any:
    return type(owner)


@functools.cache
def _slots_of(kind: Any) -> tuple[str, ...]:
    with_slots = [base for base in kind.__mro__ if "__slots__" in vars(base)]
    members = [(name, held) for base in with_slots for name, held in vars(base).items()]
    return tuple(name for name, held in members if isinstance(held, MemberDescriptorType))


class _Part:
    """A part of an object with a name of its own."""

    def get(self, owner: Any, /) -> Any:
        """Return its value; `_ABSENT` if it has none."""

    def set(self, owner: Any, value: Any, /) -> None:
        """Set its value."""

    def delete(self, owner: Any, /) -> None:
        """Delete its value. Most parts always have one."""


class _Slot(_Part):
    """An attribute that is not in the `__dict__`; written without the setter of a frozen class."""

    def __init__(self, name: str) -> None:
        self._name = name

    def get(self, owner: Any) -> Any:
        return getattr(owner, self._name, _ABSENT)

    def set(self, owner: Any, value: Any) -> None:
        object.__setattr__(owner, self._name, value)

    def delete(self, owner: Any) -> None:
        object.__delattr__(owner, self._name)


class _Cell(_Part):
    """A variable of a closure."""

    def __init__(self, cell: CellType) -> None:
        self._cell = cell

    def get(self, _: Any) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:
            return _ABSENT

    def set(self, _: Any, value: Any) -> None:
        self._cell.cell_contents = value

    def delete(self, _: Any) -> None:
        del self._cell.cell_contents


class _Arguments(_Part):
    """The positional arguments of a partial function."""

    def get(self, owner: Any) -> Any:
        return owner.args

    def set(self, owner: Any, value: Any) -> None:
        owner.__setstate__((owner.func, value, owner.keywords, vars(owner)))


class _Keywords(_Part):
    """The keyword arguments of a partial function."""

    def get(self, owner: Any) -> Any:
        return owner.keywords

    def set(self, owner: Any, value: Any) -> None:
        owner.__setstate__((owner.func, owner.args, value, vars(owner)))


class _Items(_Part):
    """The items of a container, read and written past the methods of its class."""

    def get(self, owner: Any) -> Any:
        base = _base_of(owner)
        if base.__len__(owner) > MOST_ITEMS:
            return _TOO_MANY
        return base(base.items(owner)) if issubclass(base, dict) else base(base.__iter__(owner))

    def set(self, owner: Any, value: Any) -> None:
        base = _base_of(owner)
        base.clear(owner)
        fill: Callable[..., None] = base.update if issubclass(base, dict | set) else base.extend
        fill(owner, value)


_TOO_MANY = object()
"""In place of the items. It is not a plain value."""


def _base_of(owner: Any) -> Any:
    return next(base for base in (OrderedDict, dict, list, set, deque) if isinstance(owner, base))


def _cells_of(function: FunctionType) -> dict[str, _Part]:
    return dict(zip(function.__code__.co_freevars, map(_Cell, function.__closure__ or ()), strict=True))


class _Parts(MutableMapping[str, Any]):
    """An object with its `__dict__`, if it has one, and other parts by name."""

    def __init__(self, owner: Any, parts: dict[str, _Part]) -> None:
        self._owner, self._parts = owner, parts
        self._dict: dict[str, Any] = getattr(owner, "__dict__", {})

    def __iter__(self) -> Iterator[str]:
        yield from self._dict
        yield from (name for name, part in self._parts.items() if part.get(self._owner) is not _ABSENT)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Any:
        if name not in self._parts:
            return self._dict[name]
        if (value := self._parts[name].get(self._owner)) is _ABSENT:
            raise KeyError(name)
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._parts:
            self._parts[name].set(self._owner, value)
        else:
            self._dict[name] = value

    def __delitem__(self, name: str) -> None:
        if name in self._parts:
            self._parts[name].delete(self._owner)
        else:
            del self._dict[name]


class _OfClass(MutableMapping[str, Any]):
    """The variables of a class that are not methods or other descriptors."""

    def __init__(self, owner: type) -> None:
        self._owner = owner

    def __iter__(self) -> Iterator[str]:
        return (name for name, value in vars(self._owner).items() if _is_variable(name, value))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Any:
        return vars(self._owner)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._owner, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._owner, name)


def _is_variable(name: str, value: Any) -> bool:
    return not (name.startswith(("__", "_abc_")) or hasattr(type(value), "__get__"))
