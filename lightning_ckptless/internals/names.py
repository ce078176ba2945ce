"""Whether private names of another project are where this package looks for them, found out before they are used.

Names of a class include the attributes that its methods use: most of what is touched is set when an object is made, and
there is no object yet.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import CodeType
from typing import Any

from lightning_ckptless.errors import VersionError

Table = Mapping[str, str]
"""By `module` or `module:Class`: names that it has, separated by spaces."""


def require(library: str, version: str, table: Table) -> None:
    """Refuse a version of a library that has moved names of a table.

    Args:
        library: its name.
        version: of it.
        table: names that are used.

    Raises:
        VersionError: some are not there.
    """
    if moved := list(missing(table)):
        raise VersionError(
            f"{library} {version} has moved {', '.join(moved)}: lightning_ckptless cannot work with it. Install a "
            f"version of {library} that is in the table of supported ones (see the page on compatibility)"
        )


def missing(table: Table) -> Iterator[str]:
    """The names of a table that are not where it says."""
    for place, names in table.items():
        owner = _owner(place)
        for name in names.split():
            if owner is None or not has(owner, name):
                yield f"{place.replace(':', '.')}.{name}"


def has(owner: Any, name: str) -> bool:
    """Whether a module, or a class and its objects, have a name.

    Args:
        owner: the module or class.
        name: of one of its parts; for a class also of an attribute that a method of it uses.
    """
    if hasattr(owner, name):
        return True
    return inspect.isclass(owner) and any(name in _used_in(base) for base in owner.__mro__[:-1])


def _owner(place: str) -> Any:
    module, _, path = place.partition(":")
    try:
        owner: Any = import_module(module)
    except ImportError:
        return None
    for part in path.split(".") if path else ():
        owner = getattr(owner, part, None)
    return owner


def _used_in(cls: type) -> set[str]:
    """The names that a class annotates, and those that the code of its methods and properties uses."""
    found = set(vars(cls).get("__annotations__", ()))
    for value in vars(cls).values():
        for function in (value, getattr(value, "fget", None), getattr(value, "__func__", None)):
            code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
            if isinstance(code, CodeType):
                found |= set(code.co_names)
    return found
