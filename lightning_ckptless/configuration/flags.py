"""Options as flags of a command line."""

from __future__ import annotations

from argparse import SUPPRESS, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any

from lightning_ckptless.configuration.option import Option, options_of


def add_flags(group: Any, options: type) -> None:
    """Add the options that have a flag to a parser, or to a group of its arguments.

    Args:
        group: the parser or group.
        options: dataclass of the options.
    """
    for each in options_of(options).values():
        if each.about.flag:
            group.add_argument(each.about.flag, dest=each.name, default=SUPPRESS, help=help_of(each), **_reading(each))


def given_flags(arguments: Namespace, options: type) -> dict[str, Any]:
    """Return the options that were given on a parsed command line, as keywords.

    Args:
        arguments: the parsed command line.
        options: dataclass of the options.
    """
    flags = {each.name for each in options_of(options).values() if each.about.flag}
    return {name: value for name, value in vars(arguments).items() if name in flags}


def switches(options: type) -> frozenset[str]:
    """Return the flags that take no value.

    Args:
        options: dataclass of the options.
    """
    found = [each for each in options_of(options).values() if each.about.flag and each.kind is bool]
    negative = (each.about.flag.replace("--", "--no-", 1) for each in found if each.default is None)
    return frozenset({*(each.about.flag for each in found), *negative})


def help_of(option: Option, default: str = "") -> str:
    """Return the help of an option's flag.

    Args:
        option: the option.
        default: what applies without the flag; empty to derive it from the option.
    """
    shown = default or option.about.none
    if not shown and option.default and not isinstance(option.default, tuple):
        shown = f"{option.default:g}" if isinstance(option.default, float) else str(option.default)
    return f"{option.about.help} (default: {shown})" if shown else option.about.help


def metavar_of(option: Option) -> str:
    """Return the word that stands for an option's value."""
    if option.about.metavar:
        return option.about.metavar
    if option.kind is Path:
        return "FOLDER"
    return "SECONDS" if option.about.unit == "seconds" else "N"


def _reading(option: Option) -> dict[str, Any]:
    """How argparse reads an option's value."""
    if option.kind is bool:
        return {"action": BooleanOptionalAction if option.default is None else "store_true"}
    if option.kind is tuple:
        return {"action": "append", "metavar": metavar_of(option)}
    return {"type": option.kind, "metavar": metavar_of(option)}
