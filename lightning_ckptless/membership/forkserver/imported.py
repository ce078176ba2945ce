"""What a program has imported when it comes to the training loop, as its worker says it to the agent.

A module counts where it is installed: in a folder named `site-packages` or `dist-packages`, in the standard library, or
in this package. What lies beside the program, or where `PYTHONPATH` leads, is the user's own, and so is the package
that the program is in: these are run by every new process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning_ckptless

_INSTALLED = frozenset({"site-packages", "dist-packages"})
_LIBRARIES = (os.path.dirname(os.__file__), os.path.dirname(lightning_ckptless.__file__))


@dataclass(frozen=True, slots=True)
class Imported:
    """What a program has imported.

    Args:
        modules: files of the installed modules by name, in the order in which their imports began.
        variables: those of the environment that the program, or what it has imported, has changed since its start; None
            for one that it has removed.
        path: where it looks for modules.
    """

    modules: dict[str, str]
    variables: dict[str, str | None]
    path: list[str]

    def to_message(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Start:
    modules: frozenset[str]
    variables: dict[str, str]


_starts: list[_Start] = []
"""Of this process, until it is asked what has been imported since."""


def note_start() -> None:
    """Note what there is before the program begins; called in a worker that was forked."""
    _starts[:] = [_Start(frozenset(sys.modules), dict(os.environ))]


def take_imported() -> Imported | None:
    """What the program has imported since its start, once; None where that was asked for before, or is not known."""
    if not _starts:
        return None
    start = _starts.pop()
    return Imported(
        installed_modules(sys.modules, start.modules, sys.modules.get("__main__")),
        changed_variables(start.variables, os.environ),
        [str(folder) for folder in sys.path],
    )


def installed_modules(
    modules: Mapping[str, ModuleType], before: Collection[str], main: ModuleType | None
) -> dict[str, str]:
    """The files of installed modules, by name.

    Args:
        modules: all that are imported.
        before: names of those that do not count.
        main: the program, whose own package does not count.
    """
    file = str(getattr(main, "__file__", None) or "")
    package = str(getattr(main, "__package__", None) or "").partition(".")[0]
    own = os.path.join(os.path.dirname(os.path.realpath(file)), "") if is_installed(file) else None
    found = {}
    for name, module in list(modules.items()):
        # Not by getattr: a module that loads its parts when they are asked for would do so.
        spec = getattr(module, "__dict__", {}).get("__spec__")
        origin = getattr(spec, "origin", None)
        if name in before or spec is None or origin is None or spec.name != name or not spec.has_location:
            continue
        if not is_installed(origin) or name.partition(".")[0] == package:
            continue
        if own is None or not os.path.realpath(origin).startswith(own):
            found[name] = str(origin)
    return found


def is_installed(file: str) -> bool:
    """Whether a module's file is where installed modules are."""
    return not _INSTALLED.isdisjoint(Path(file).parts) or any(Path(file).is_relative_to(each) for each in _LIBRARIES)


def changed_variables(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str | None]:
    """The variables that differ, as they are afterwards; None for one that is no longer there."""
    names = before.keys() | after.keys()
    return {name: after.get(name) for name in sorted(names) if before.get(name) != after.get(name)}
