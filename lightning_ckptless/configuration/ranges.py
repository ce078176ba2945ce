"""The values that an option takes, with the words that messages and pages use for them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from numbers import Real
from typing import Any


@dataclass(frozen=True, slots=True)
class Range:
    """The values that an option takes.

    Args:
        expected: the values in words, as they follow "expected".
        admits: whether a value is one of them.
    """

    expected: str
    admits: Callable[[Any], bool]

    def __or__(self, other: Range) -> Range:
        """The values of both."""
        return Range(f"{self.expected}, or {other.expected}", lambda value: self.admits(value) or other.admits(value))


ANYTHING = Range("any value", lambda _: True)
FLAG = Range("True or False", lambda value: value in (True, False))
NONE = Range("None", lambda value: value is None)
PATH = Range("a path", lambda value: isinstance(value, str | os.PathLike))


def constant(word: str) -> Range:
    """One word, e.g. `auto` as an alternative to numbers."""
    return Range(repr(word), lambda value: value == word)


def one_of(words: Collection[str]) -> Range:
    """One of several words."""
    return Range(f"one of {', '.join(map(repr, words))}", lambda value: value in words)


def integer(least: int) -> Range:
    """Integers from `least`."""
    return Range(f"an integer of at least {least}", lambda value: isinstance(value, int) and value >= least)


def number(least: float) -> Range:
    """Numbers from `least`."""
    return Range(f"a number of at least {least:g}", lambda value: _number(value) >= least)


def positive() -> Range:
    """Numbers above 0."""
    return Range("a number greater than 0", lambda value: _number(value) > 0)


def share() -> Range:
    """Numbers above 0, up to 1."""
    return Range("a number greater than 0 and at most 1", lambda value: 0 < _number(value) <= 1)


def _number(value: Any) -> float:
    """The value, or NaN, which is in no range, if it is not a number."""
    return float(value) if isinstance(value, Real) else math.nan


def text(pattern: str, expected: str) -> Range:
    """Texts that match a pattern.

    Args:
        pattern: regular expression of the whole text.
        expected: the same in words.
    """
    return Range(expected, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


def texts(pattern: str, expected: str) -> Range:
    """Lists of texts that match a pattern each.

    Args:
        pattern: regular expression of a whole text.
        expected: the list in words.
    """
    one = text(pattern, "")
    return Range(
        expected,
        lambda value: isinstance(value, Collection) and not isinstance(value, str) and all(map(one.admits, value)),
    )
