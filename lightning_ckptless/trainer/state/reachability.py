"""The objects that can be reached from one: by attributes, through small containers, without looking into data."""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lightning_ckptless.internals.lightning.distribution import is_part_of_a_run

MOST_OBJECTS = 128
MOST_ITEMS = 64
"""Of a container that is looked through; a longer one is data."""
_DATA = frozenset({"numpy", "pandas", "pyarrow", "polars", "PIL", "h5py", "zarr", "scipy"})
_SEEN_OF_TORCH = ("torch.utils.data", "torch.nn", "torchdata")


def reach(root: Any, path: str, enters: Callable[[Any], bool] = lambda _: True) -> Iterator[tuple[str, Any]]:
    """An object, and those that it holds by attributes, nearest first, with their paths.

    Tensors, arrays, tables, functions, what belongs to Python, and parts of a run of Lightning are left out.

    Args:
        root: the object.
        path: what it is called.
        enters: whether to look at an object and what it holds.
    """
    waiting, seen = deque([(path, root)]), {id(root)}
    left = MOST_OBJECTS
    while waiting and left:
        at, found = waiting.popleft()
        if has_attributes(found):
            yield at, found
            left -= 1
        for name, inner in _inside(found):
            if id(inner) not in seen and enters(inner):
                seen.add(id(inner))
                waiting.append((f"{at}.{name}" if name[0] != "[" else f"{at}{name}", inner))


def has_attributes(value: Any) -> bool:
    """Whether an object keeps attributes that may be state."""
    if isinstance(value, torch.Tensor | torch.Generator | type | types.FunctionType | types.ModuleType):
        return False
    cls: Any = type(value)
    if not (cls.__dictoffset__ and cls.__weakrefoffset__) or is_part_of_a_run(value):
        return False
    module: str = cls.__module__
    top = module.partition(".")[0]
    if top == "torch":
        return module.startswith(_SEEN_OF_TORCH)
    return top == "__main__" or (top not in _DATA and top not in sys.stdlib_module_names)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, functools.partial):
        yield from (("func", value.func), *((f"[{i}]", item) for i, item in enumerate(value.args)))
        yield from ((f"[{key!r}]", item) for key, item in value.keywords.items())
    elif isinstance(value, types.MethodType):
        yield "__self__", value.__self__
    elif type(value) in (list, tuple, deque):
        if len(value) <= MOST_ITEMS:
            yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif type(value) is dict:
        if len(value) <= MOST_ITEMS:
            yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif has_attributes(value):
        yield from vars(value).items()
