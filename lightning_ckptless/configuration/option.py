"""An option: declared once as the field of a dataclass, with its meaning, its values and where else it can be set.

Validation, keywords of a constructor and their documentation, flags, environment variables and tables in pages are
derived from these fields.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_ckptless.configuration.ranges import ANYTHING, FLAG, NONE, PATH, Range, one_of
from lightning_ckptless.errors import OptionsError

T = TypeVar("T")
_ABOUT = "about"


@dataclass(frozen=True, slots=True)
class About:
    """The declaration of an option, in addition to its name, type and default.

    Args:
        help: meaning of its value, without a full stop.
        values: the values it takes other than None; None to derive them from the type.
        unit: unit of its value; empty if it has none.
        none: what None stands for; empty if it does not take None.
        flag: option of `ckptless run` that sets it; empty if there is none.
        metavar: stands for its value in the help of the flag; empty to derive it from type and unit.
        variable: environment variable that passes it from an agent to its workers; empty if there is none.
    """

    help: str
    values: Range | None = None
    unit: str = ""
    none: str = ""
    flag: str = ""
    metavar: str = ""
    variable: str = ""


def option(default: T, help: str, values: Range | None = None, **more: Any) -> T:  # noqa: A002 - as in argparse
    """Declare an option as the field of a dataclass.

    Args:
        default: its default.
        help: meaning of its value, without a full stop.
        values: the values it takes other than None; None to derive them from the type.
        more: further arguments of `About`.
    """
    made: Any = field(default=default, metadata=about(help, values, **more))
    declared: T = made
    return declared


def about(help: str, values: Range | None = None, **more: Any) -> Mapping[str, About]:  # noqa: A002
    """Return the metadata of a field that is an option. For fields with a default factory; otherwise see `option`."""
    return {_ABOUT: About(help, values, **more)}


def option_of(options: type, name: str, **changes: Any) -> Any:
    """Declare an option of another dataclass again, where it may be left open: its default is None.

    Args:
        options: the other dataclass.
        name: name of the option.
        changes: arguments of `About` that differ.
    """
    return field(default=None, metadata={_ABOUT: replace(options_of(options)[name].about, **changes)})


@dataclass(frozen=True, slots=True)
class Option:
    """Everything that is known of an option.

    Args:
        name: its keyword.
        type: its type.
        default: its default.
        about: what is declared of it.
        range: the values it takes, None included.
    """

    name: str
    type: Any
    default: Any
    about: About
    range: Range

    @property
    def kind(self) -> type:
        """Class of its values, other than None."""
        return next(get_origin(each) or each for each in _members(self.type) if each is not types.NoneType)

    @property
    def text(self) -> str:
        """Its meaning, that of None included."""
        return f"{self.about.help}; None for {self.about.none}" if self.about.none else self.about.help

    def require(self, value: Any) -> None:
        """Refuse a value that is out of range.

        Raises:
            OptionsError: it is.
        """
        if not self.range.admits(value):
            raise OptionsError(f"{self.name}={value!r}: expected {self.range.expected}")


class Options:
    """Base of dataclasses whose fields are options: refuses values out of range, and turns text into paths."""

    def __post_init__(self) -> None:
        cls: type = type(self)
        for each in options_of(cls).values():
            value = getattr(self, each.name)
            each.require(value)
            if each.kind is Path and value is not None:
                object.__setattr__(self, each.name, Path(value))


@cache
def options_of(cls: type) -> Mapping[str, Option]:
    """Return the options of a dataclass by name: those of its bases in their order, then its own."""
    hints = get_type_hints(cls)
    groups = [group for group in (*cls.__bases__, cls) if is_dataclass(group)]
    declared = [each for group in groups for each in fields(group) if _ABOUT in each.metadata]
    return {each.name: _option(each, hints[each.name], each.metadata[_ABOUT]) for each in declared}


def _option(declared: Field[Any], hint: Any, facts: About) -> Option:
    factory: Any = declared.default_factory
    default = factory() if factory is not MISSING else declared.default
    values = facts.values or _range_of(hint)
    return Option(declared.name, hint, default, facts, values | NONE if types.NoneType in _members(hint) else values)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _range_of(hint: Any) -> Range:
    """The values of a type, None left out."""
    for member in _members(hint):
        if get_origin(member) is Literal:
            return one_of(get_args(member))
        if member is bool:
            return FLAG
        if member is Path:
            return PATH
    return ANYTHING
