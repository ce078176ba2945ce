"""Schemas for values read from files, checked before anything is allocated or computed from them.

A check takes a JSON value and its path in the record, and returns the value to use or raises an error. Checks are
composable: `record(Owner, pid=integer(1, 4_194_304), started_at=number(0, 1e12))`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
"""A value that JSON can represent."""

Check = Callable[[Any, str], Any]

SHOWN_CHARS = 60
LARGEST = 1 << 53
"""Largest integer that every JSON reader represents exactly: the limit for lengths, offsets and steps."""
LONGEST_TEXT = 4096
MOST_RANKS = 1 << 17
MOST_ITEMS = 1 << 24
SECONDS = 1e12


class SchemaError(ValueError):
    """A value does not match its schema."""


def refused(path: str, expected: str, found: Any) -> SchemaError:
    """Return the error for a value that does not match its schema.

    Args:
        path: path of the value in its record.
        expected: description of valid values.
        found: the value.
    """
    shown = repr(found) if isinstance(found, bool | int | float | str | None) else f"a {type(found).__name__}"
    shown = shown if len(shown) <= SHOWN_CHARS else f"{shown[:SHOWN_CHARS]}..."
    return SchemaError(f"{path or 'the record'}: expected {expected}, found {shown}")


def integer(least: int = 0, most: int = LARGEST) -> Check:
    """Accept an integer within limits; booleans are refused."""

    def check(value: Any, path: str) -> int:
        if type(value) is not int or not least <= value <= most:
            raise refused(path, f"an integer from {least} to {most}", value)
        return value

    return check


def number(least: float = 0.0, most: float = SECONDS) -> Check:
    """Accept a finite number within limits; NaN is outside of any limits."""

    def check(value: Any, path: str) -> float:
        if type(value) not in (int, float) or not least <= value <= most:
            raise refused(path, f"a number from {least:g} to {most:g}", value)
        return value  # type: ignore[no-any-return]

    return check


def boolean(value: Any, path: str) -> bool:
    """Accept a boolean."""
    if type(value) is not bool:
        raise refused(path, "true or false", value)
    return value


def text(pattern: str = "", *, longest: int = LONGEST_TEXT) -> Check:
    """Accept text of limited length.

    Args:
        pattern: regular expression that the complete text must match; empty for any text.
        longest: maximum number of characters.
    """
    compiled = re.compile(pattern) if pattern else None

    def check(value: Any, path: str) -> str:
        if type(value) is not str or len(value) > longest:
            raise refused(path, f"text of at most {longest} characters", value)
        if compiled is not None and not compiled.fullmatch(value):
            raise refused(path, f"text that matches {pattern}", value)
        return value

    return check


def one_of(*allowed: str) -> Check:
    """Accept one of several strings."""

    def check(value: Any, path: str) -> str:
        if type(value) is not str or value not in allowed:
            raise refused(path, f"one of {', '.join(allowed)}", value)
        return value

    return check


def optional(inner: Check) -> Check:
    """Accept None, or what another check accepts."""
    return lambda value, path: None if value is None else inner(value, path)


def sequence(inner: Check, *, most: int = MOST_ITEMS, length: int | None = None) -> Check:
    """Accept a list and convert it to a tuple.

    Args:
        inner: check for each item.
        most: maximum number of items.
        length: exact number of items; None for any up to `most`.
    """

    def check(value: Any, path: str) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > most or length not in (None, len(value)):
            raise refused(path, f"a list of {'at most ' if length is None else ''}{length or most} items", value)
        return tuple([inner(item, f"{path}[{index}]") for index, item in enumerate(value)])

    return check


def table(key: Check, inner: Check, *, most: int = MOST_ITEMS) -> Check:
    """Accept an object with arbitrary keys.

    Args:
        key: check for each key.
        inner: check for each value.
        most: maximum number of entries.
    """

    def check(value: Any, path: str) -> dict[Any, Any]:
        if type(value) is not dict or len(value) > most:
            raise refused(path, f"an object of at most {most} entries", value)
        return {key(name, f"a key of {path}"): inner(item, f"{path}.{name}") for name, item in value.items()}

    return check


def record(make: Callable[..., Any] = dict, /, *, extra: bool = False, **fields: Check) -> Check:
    """Accept an object with given keys.

    Args:
        make: called with the checked values as keyword arguments, e.g. a data class.
        extra: whether other keys are allowed, which are dropped.
        **fields: check for each key; a key may be missing only if its check accepts None.
    """

    def check(value: Any, path: str) -> Any:
        if type(value) is not dict:
            raise refused(path, "an object", value)
        if not extra and (unknown := value.keys() - fields.keys()):
            raise refused(path, f"the keys {', '.join(fields)}", min(unknown))
        start = f"{path}." if path else ""
        return make(**{name: inner(value.get(name), f"{start}{name}") for name, inner in fields.items()})

    return check


def as_it_is(inner: Check) -> Check:
    """Accept what another check accepts, and return the value unconverted."""

    def check(value: Any, path: str) -> Any:
        inner(value, path)
        return value

    return check


def plain(depth: int = 32) -> Check:
    """Accept any JSON value with limited nesting."""

    def check(value: Any, path: str) -> Any:
        inside: Sequence[Any] | Mapping[str, Any] = ()
        if isinstance(value, list):
            inside = value
        elif isinstance(value, dict):
            inside = list(value.values())
        elif not isinstance(value, bool | int | float | str | None):
            raise refused(path, "plain data", value)
        if inside and not depth:
            raise refused(path, "data that is nested less deeply", value)
        for item in inside:
            plain(depth - 1)(item, path)
        return value

    return check


HIGHEST_PID = 1 << 22
"""The highest process id that the kernel assigns."""
PID = integer(1, HIGHEST_PID)
RANK = integer(0, MOST_RANKS - 1)
STEP = integer()
BYTES = integer()
