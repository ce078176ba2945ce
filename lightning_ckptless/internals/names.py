"""Checks before training that all private names of another library that this package uses exist.

For a class, the attributes that its methods use count as well: most of the names are set in constructors, and there are
no objects yet.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import CodeType
from typing import Any

from lightning_ckptless.errors import VersionError

Table = Mapping[str, str]
"""Required names, separated by spaces, by `module` or `module:Class`."""


def require(library: str, version: str, table: Table) -> None:
    """Refuse a version of a library that lacks names of a table.

    Args:
        library: name of the library.
        version: version of the library.
        table: required names.

    Raises:
        VersionError: some names do not exist.
    """
    if absent := list(missing(table)):
        raise VersionError(
            f"{library} {version} lacks {', '.join(absent)}, which lightning_ckptless uses: install a supported "
            f"version of {library} (see the compatibility page)"
        )


def missing(table: Table) -> Iterator[str]:
    """Yield the names of a table that do not exist."""
    for location, names in table.items():
        owner = _owner(location)
        for name in names.split():
            if owner is None or not has(owner, name):
                yield f"{location.replace(':', '.')}.{name}"


def has(owner: Any, name: str) -> bool:
    """Return whether a module has a name, or a class or its objects have it.

    Args:
        owner: module or class.
        name: name of a member; for a class also an attribute that one of its methods uses.
    """
    if hasattr(owner, name):
        return True
    return inspect.isclass(owner) and any(name in _used_in(base) for base in owner.__mro__[:-1])


def _owner(location: str) -> Any:
    module, _, path = location.partition(":")
    try:
        owner: Any = import_module(module)
    except ImportError:
        return None
    for part in path.split(".") if path else ():
        owner = getattr(owner, part, None)
    return owner


def _used_in(cls: type) -> set[str]:
    """Return the annotated names of a class and those used in its methods and properties."""
    found = set(vars(cls).get("__annotations__", ()))
    for value in vars(cls).values():
        for function in (value, getattr(value, "fget", None), getattr(value, "__func__", None)):
            code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
            if isinstance(code, CodeType):
                found |= set(code.co_names)
    return found
