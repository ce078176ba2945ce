"""What a script has imported by the time it reaches the training loop, as its worker reports it to the agent.

A module counts if it is installed: in a folder named `site-packages` or `dist-packages`, in the standard library, or in
this package. Modules next to the script or on `PYTHONPATH` are the user's own, as is the package that contains the
script: every new process runs these itself.
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
    """What a script has imported.

    Args:
        modules: files of the installed modules by name, in the order in which their imports began.
        variables: environment variables changed since the start by the script or its imports; None for a removed one.
        path: its module search path.
    """

    modules: dict[str, str]
    variables: dict[str, str | None]
    path: list[str]

    def to_message(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Start:
    modules: frozenset[str]
    variables: dict[str, str]


_starts: list[_Start] = []
"""The state at the start of this process's script; taken once."""


def note_start() -> None:
    """Record what exists before the script begins; called in a forked worker."""
    _starts[:] = [_Start(frozenset(sys.modules), dict(os.environ))]


def take_imported() -> Imported | None:
    """Return what the script has imported since its start; None if already taken, or unknown."""
    if not _starts:
        return None
    start = _starts.pop()
    return Imported(
        installed_modules(sys.modules, start.modules, sys.modules.get("__main__")),
        changed_variables(start.variables, os.environ),
        [str(folder) for folder in sys.path],
    )


def count_imported() -> int:
    """Return how many modules the script has imported since its start; 0 if unknown.

    Listing them would take 30 ms: a forked process copies the memory of every module that it looks at.
    """
    return max(0, len(sys.modules) - len(_starts.pop().modules)) if _starts else 0


def installed_modules(
    modules: Mapping[str, ModuleType], before: Collection[str], main: ModuleType | None
) -> dict[str, str]:
    """Return the files of installed modules, by name.

    Args:
        modules: all that are imported.
        before: names of modules that do not count.
        main: the script, whose own package does not count.
    """
    file = str(getattr(main, "__file__", None) or "")
    package = str(getattr(main, "__package__", None) or "").partition(".")[0]
    own = os.path.join(os.path.dirname(os.path.realpath(file)), "") if is_installed(file) else None
    found = {}
    for name, module in list(modules.items()):
        # Not with getattr, which would make a lazy module load something.
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
    """Whether a module's file is in a folder of installed modules."""
    return not _INSTALLED.isdisjoint(Path(file).parts) or any(Path(file).is_relative_to(each) for each in _LIBRARIES)


def changed_variables(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str | None]:
    """Return the variables that differ, with their new values; None for a removed one."""
    names = before.keys() | after.keys()
    return {name: after.get(name) for name in sorted(names) if before.get(name) != after.get(name)}
