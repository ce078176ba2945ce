"""Finds the objects reachable from one object through attributes and small containers, without looking into data."""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lightning_ckptless.internals.lightning.distribution import is_part_of_a_run
from lightning_ckptless.trainer.state.object_attributes import ITEMS, attributes_of, consists_of_parts

MOST_OBJECTS = 128
MOST_ITEMS = 64
"""Largest container that is searched; a longer one is treated as data."""
_DATA = frozenset({"numpy", "pandas", "pyarrow", "polars", "PIL", "h5py", "zarr", "scipy"})
_LIGHTNING = frozenset({"lightning", "pytorch_lightning", "lightning_fabric"})
_SEEN_OF_TORCH = ("torch.utils.data", "torch.nn", "torchdata")
_CONTAINERS = frozenset({"argparse", "collections", "functools", "queue", "types"})
"""Modules of the standard library whose objects are what their attributes are."""


def reach(root: Any, path: str, enters: Callable[[Any], bool] = lambda _: True) -> Iterator[tuple[str, Any]]:
    """Yield an object and the objects reachable through its attributes, with their paths, nearest first.

    Tensors, arrays, tables, most objects of the standard library and parts of a Lightning run are skipped, and so are
    functions that keep nothing.

    Args:
        root: the object.
        path: its name.
        enters: whether to visit an object and what it holds.
    """
    waiting, seen = deque([(path, root)]), {id(root)}
    left = MOST_OBJECTS
    while waiting and left:
        at, found = waiting.popleft()
        if has_attributes(found):
            yield at, found
            left -= 1
        for name, held in _held_by(found):
            if id(held) not in seen and enters(held):
                seen.add(id(held))
                waiting.append((f"{at}.{name}" if name[0] != "[" else f"{at}{name}", held))


def has_attributes(value: Any) -> bool:
    """Return whether an object has attributes that may be state."""
    if isinstance(value, torch.Tensor | torch.Generator | type | types.ModuleType):
        return False
    cls: Any = type(value)
    module = home_of(value)
    has_dict = cls.__dictoffset__ and (cls.__weakrefoffset__ or module in _CONTAINERS)
    is_kept = consists_of_parts(value) or (has_dict and not isinstance(value, types.FunctionType))
    if not is_kept or is_part_of_a_run(value):
        return False
    top = module.partition(".")[0]
    if isinstance(value, types.FunctionType | functools.partial):
        # Functions of Lightning and torch keep nothing that training changes.
        inner = getattr(value, "func", value)
        return str(getattr(inner, "__module__", None)).partition(".")[0] not in _LIGHTNING | {"torch"}
    if top == "torch":
        return module.startswith(_SEEN_OF_TORCH)
    return top in ("__main__", *_CONTAINERS) or (top not in _DATA and top not in sys.stdlib_module_names)


def home_of(value: Any) -> str:
    """Return the name of the module that defines a function, or the class of an object."""
    return str(value.__module__ if isinstance(value, types.FunctionType) else type(value).__module__)


def is_of_standard_library(value: Any) -> bool:
    """Return whether a value is an object of the standard library that has attributes."""
    return home_of(value) in _CONTAINERS


def _held_by(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, functools.partial):
        yield from (("func", value.func), *((f"[{i}]", item) for i, item in enumerate(value.args)))
        yield from ((f"[{key!r}]", item) for key, item in value.keywords.items())
    elif isinstance(value, types.MethodType):
        yield "__self__", value.__self__
    elif isinstance(value, list | tuple | deque):
        if len(value) <= MOST_ITEMS:
            yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, dict) and len(value) <= MOST_ITEMS:
        yield from ((f"[{key!r}]", item) for key, item in list(value.items()))
    if has_attributes(value):
        yield from ((name, held) for name, held in attributes_of(value).items() if name != ITEMS)
