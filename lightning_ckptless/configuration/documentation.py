"""Options in docstrings, in the format that `help()` and jsonargparse read.

Apart from `option.py`, because declaring an option needs no knowledge of docstrings.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from inspect import cleandoc
from typing import Any, TypeVar

from lightning_ckptless.configuration.option import options_of

T = TypeVar("T", bound=Callable[..., Any])
_SECTION = "Args:\n"
_WIDTH = 120


def documented(options: type) -> Callable[[T], T]:
    """Make a decorator that adds options to the arguments in a docstring, before those that it describes itself.

    Args:
        options: dataclass of the options.
    """

    def decorate(described: T) -> T:
        if described.__doc__:
            text = cleandoc(described.__doc__)
            if _SECTION not in text:
                text = f"{text}\n\n{_SECTION}"
            described.__doc__ = text.replace(_SECTION, _SECTION + arguments(options), 1)
        return described

    return decorate


def arguments(options: type) -> str:
    """Return the lines of a docstring that describe options.

    Args:
        options: dataclass of the options.
    """
    lines = (
        textwrap.fill(
            f"{each.name}: {each.text}.",
            _WIDTH,
            initial_indent=" " * 4,
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
        )
        for each in options_of(options).values()
    )
    return "".join(f"{line}\n" for line in lines)
