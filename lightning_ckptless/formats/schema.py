"""Schemas: what a value that was read from a file may be, checked before anything is allocated or computed from it.

A check takes a value, as JSON has it, and its place in the record. It returns the value to use, or raises. Checks are
built from each other: `record(Owner, pid=integer(1, 4_194_304), started_at=number(0, 1e12))`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Check = Callable[[Any, str], Any]

SHOWN_CHARS = 60
LARGEST = 1 << 53
"""The largest whole number that every JSON reader keeps exactly: the limit of lengths, offsets and steps."""
LONGEST_TEXT = 4096
MOST_RANKS = 1 << 17
MOST_ITEMS = 1 << 24
SECONDS = 1e12


class SchemaError(ValueError):
    """A value is not what its schema says."""


def refused(place: str, expected: str, found: Any) -> SchemaError:
    """The error for a value.

    Args:
        place: of the value in its record.
        expected: what it should have been, in words.
        found: the value.
    """
    shown = repr(found) if isinstance(found, bool | int | float | str | None) else f"a {type(found).__name__}"
    shown = shown if len(shown) <= SHOWN_CHARS else f"{shown[:SHOWN_CHARS]}..."
    return SchemaError(f"{place or 'the record'}: expected {expected}, found {shown}")


def integer(least: int = 0, most: int = LARGEST) -> Check:
    """A whole number within limits; a truth value is none."""

    def check(value: Any, place: str) -> int:
        if type(value) is not int or not least <= value <= most:
            raise refused(place, f"a whole number from {least} to {most}", value)
        return value

    return check


def number(least: float = 0.0, most: float = SECONDS) -> Check:
    """A finite number within limits. What is no number lies outside of any."""

    def check(value: Any, place: str) -> float:
        if type(value) not in (int, float) or not least <= value <= most:
            raise refused(place, f"a number from {least:g} to {most:g}", value)
        return value  # type: ignore[no-any-return]

    return check


def boolean(value: Any, place: str) -> bool:
    """A truth value."""
    if type(value) is not bool:
        raise refused(place, "true or false", value)
    return value


def text(pattern: str = "", *, longest: int = LONGEST_TEXT) -> Check:
    """Text that has at most so many characters.

    Args:
        pattern: a regular expression that all of it must match; empty for any text.
        longest: number of characters.
    """
    whole = re.compile(pattern) if pattern else None

    def check(value: Any, place: str) -> str:
        if type(value) is not str or len(value) > longest:
            raise refused(place, f"text of at most {longest} characters", value)
        if whole is not None and not whole.fullmatch(value):
            raise refused(place, f"text that matches {pattern}", value)
        return value

    return check


def one_of(*allowed: str) -> Check:
    """One of some words."""

    def check(value: Any, place: str) -> str:
        if type(value) is not str or value not in allowed:
            raise refused(place, f"one of {', '.join(allowed)}", value)
        return value

    return check


def optional(inner: Check) -> Check:
    """What another check accepts, or nothing."""
    return lambda value, place: None if value is None else inner(value, place)


def sequence(inner: Check, *, most: int = MOST_ITEMS, length: int | None = None) -> Check:
    """A list, which becomes a tuple.

    Args:
        inner: of each item.
        most: number of items.
        length: the number of items where there is but one.
    """

    def check(value: Any, place: str) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > most or length not in (None, len(value)):
            raise refused(place, f"a list of {'at most ' if length is None else ''}{length or most} items", value)
        return tuple([inner(item, f"{place}[{index}]") for index, item in enumerate(value)])

    return check


def table(key: Check, inner: Check, *, most: int = MOST_ITEMS) -> Check:
    """An object with any keys.

    Args:
        key: of each key.
        inner: of each value.
        most: number of entries.
    """

    def check(value: Any, place: str) -> dict[Any, Any]:
        if type(value) is not dict or len(value) > most:
            raise refused(place, f"an object of at most {most} entries", value)
        return {key(name, f"a key of {place}"): inner(item, f"{place}.{name}") for name, item in value.items()}

    return check


def record(make: Callable[..., Any] = dict, /, *, extra: bool = False, **fields: Check) -> Check:
    """An object with certain keys.

    Args:
        make: called with the checked values by their names, such as a data class.
        extra: whether there may be other keys, which are left out.
        **fields: the check of each key; a key is only missing where that accepts None.
    """

    def check(value: Any, place: str) -> Any:
        if type(value) is not dict:
            raise refused(place, "an object", value)
        if not extra and (unknown := value.keys() - fields.keys()):
            raise refused(place, f"the keys {', '.join(fields)}", min(unknown))
        start = f"{place}." if place else ""
        return make(**{name: inner(value.get(name), f"{start}{name}") for name, inner in fields.items()})

    return check


def as_it_is(inner: Check) -> Check:
    """What another check accepts, not changed by it: lists stay lists."""

    def check(value: Any, place: str) -> Any:
        inner(value, place)
        return value

    return check


def plain(depth: int = 32) -> Check:
    """Anything that JSON has, nested no deeper than that."""

    def check(value: Any, place: str) -> Any:
        inside: Sequence[Any] | Mapping[str, Any] = ()
        if isinstance(value, list):
            inside = value
        elif isinstance(value, dict):
            inside = list(value.values())
        elif not isinstance(value, bool | int | float | str | None):
            raise refused(place, "plain data", value)
        if inside and not depth:
            raise refused(place, "data that is nested less deeply", value)
        for item in inside:
            plain(depth - 1)(item, place)
        return value

    return check
