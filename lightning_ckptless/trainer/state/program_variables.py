"""Variables of the script: of its classes and of its modules.

`Model.calls += 1` and `global STEP` are counters as well. The classes are those of the objects that hooks are called
on. The modules are those that define these classes, those that they import, and the script itself.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from lightning_ckptless.trainer.state.object_attributes import attributes_of

_PACKAGES = {"site-packages", "dist-packages"}
_MOST_MODULES = 32
_OF_PYTHON = ("__warningregistry__", "__annotations__")
_CONSTANT = (type, FunctionType, BuiltinFunctionType, ModuleType)


def variables_of(owners: Iterable[Any]) -> Iterator[tuple[str, tuple[Any, Collection[str]]]]:
    """Yield the classes and modules that have variables, by path, with the names that are no variables.

    Args:
        owners: the objects that hooks are called on.
    """
    kinds = dict.fromkeys(cls for owner in owners for cls in type(owner).__mro__ if is_users_module(cls.__module__))
    yield from ((f"class {cls.__qualname__}", (cls, ())) for cls in kinds if attributes_of(cls))
    for name in _modules({"__main__", *(cls.__module__ for cls in kinds)}):
        held = vars(sys.modules[name])
        leave = {key for key, value in held.items() if key.startswith("__") or isinstance(value, _CONSTANT)}
        if len(leave) < len(held):
            yield name, (sys.modules[name], leave.union(_OF_PYTHON))


def _modules(first: set[str]) -> list[str]:
    found = sorted(name for name in first if isinstance(sys.modules.get(name), ModuleType))
    imported = {value.__name__ for name in found for value in vars(sys.modules[name]).values() if _is_of_script(value)}
    return [*found, *sorted(imported - set(found))][:_MOST_MODULES]


def _is_of_script(value: Any) -> bool:
    return (
        isinstance(value, ModuleType) and sys.modules.get(value.__name__) is value and is_users_module(value.__name__)
    )


@functools.cache
def is_users_module(name: str) -> bool:
    """Return whether a module is user code, not part of an installed package."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if name == "__main__" or file is None:
        return name == "__main__"
    if name.partition(".")[0] == "lightning_ckptless":
        return False
    # An environment may use packages of another one, whose folders sysconfig does not report.
    if not _PACKAGES.isdisjoint(Path(file).parts):
        return False
    installed = {sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib")}
    return not any(Path(file).is_relative_to(folder) for folder in installed)
