"""Options in environment variables, through which an agent passes them to its workers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lightning_ckptless.configuration.option import Options, options_of
from lightning_ckptless.errors import OptionsError

T = TypeVar("T", bound=Options)


def variables_of(options: Options) -> dict[str, str]:
    """Return the variables for those options that have one and are not None. Paths become absolute."""
    cls: type = type(options)
    values = {each.about.variable: getattr(options, each.name) for each in options_of(cls).values()}
    return {
        variable: str(value.absolute() if isinstance(value, Path) else value)
        for variable, value in values.items()
        if variable and value is not None
    }


def with_variables(options: T, env: Mapping[str, str] = os.environ) -> T:
    """Override options by the environment variables that are set.

    Raises:
        OptionsError: a value is out of range or of another type.
    """
    cls: type = type(options)
    given: dict[str, Any] = {}
    for each in options_of(cls).values():
        if text := env.get(each.about.variable):
            try:
                given[each.name] = each.kind(text)
            except ValueError as error:
                raise OptionsError(f"{each.about.variable}={text!r}: expected {each.range.expected}") from error
    return replace(options, **given) if given else options  # type: ignore[type-var]
