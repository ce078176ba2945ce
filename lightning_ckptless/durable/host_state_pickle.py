"""Reads a host state without the script that wrote it, and without running any of its code.

In addition to plain data, a host state may contain classes and functions of the script, such as a data class among the
hyper-parameters. These are never looked up here, even if their module can be imported. A stand-in class of the same
name records the arguments and state, and is written as it was read, so that the script finds its own class in an
exported checkpoint.
"""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Mapping, Sequence
from copyreg import __newobj__ as newobj  # type: ignore[attr-defined]
from types import SimpleNamespace
from typing import Any, Self

import torch

from lightning_ckptless.errors import DurableError
from lightning_ckptless.formats.pickles import BUNDLE, DAMAGED, MEMBER, PACKED, PART, is_safe, require_usual


class _StandIn:
    """An object of a class that is not looked up. Pickle creates objects with or without calling the class."""

    stood_in_args: tuple[Any, ...]
    stood_in_state: Any = None
    stood_in_items: list[Any]
    stood_in_pairs: list[tuple[Any, Any]]
    stood_in_was_called: bool = False

    def __new__(cls, *args: Any) -> Self:
        made = super().__new__(cls)
        made.stood_in_args = args
        made.stood_in_items, made.stood_in_pairs = [], []
        return made

    def __init__(self, *_: Any) -> None:
        self.stood_in_was_called = True

    def __setstate__(self, state: Any) -> None:
        self.stood_in_state = state

    def append(self, item: Any) -> None:
        """Record an item, for subclasses of list."""
        self.stood_in_items.append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.stood_in_pairs.append((key, value))

    def __reduce__(self) -> tuple[Any, ...]:
        made = (type(self), self.stood_in_args)
        if not self.stood_in_was_called:
            made = newobj, (type(self), *self.stood_in_args)
        items, pairs = self.stood_in_items, self.stood_in_pairs
        return *made, self.stood_in_state, iter(items) if items else None, iter(pairs) if pairs else None


class _Reader(pickle.Unpickler):
    """Reads a pickle on the host that refers to devices or to classes of a script.

    Args:
        data: the pickle.
        aside: tensors stored outside of it, by number or by name.
    """

    def __init__(self, data: bytes, aside: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] = ()) -> None:
        super().__init__(io.BytesIO(data))
        self._aside = aside
        self._stand_ins: dict[tuple[str, str], type] = {}

    def persistent_load(self, persistent_id: Any) -> torch.Tensor:
        """Return a tensor stored outside of the pickle."""
        tensor: torch.Tensor = self._aside[persistent_id]
        return tensor

    def find_class(self, module: str, name: str) -> Any:
        """Return a safe class or function, or a stand-in for anything else."""
        full_name = f"{module}.{name}"
        if full_name in _ON_HOST:
            return _ON_HOST[full_name]
        if full_name == MEMBER:
            return self._member
        if full_name == PART:
            return self._part
        return getattr(importlib.import_module(module), name) if is_safe(full_name) else self._stand_in(module, name)

    def _member(self, module: str, name: str, value: Any) -> Any:
        return self._stand_in(module, name)(value)

    def _part(self, data: bytes) -> Any:
        require_usual(data)
        reader = _Reader(data)
        reader._stand_ins = self._stand_ins
        return reader.load()

    def _stand_in(self, module: str, name: str) -> type:
        if (module, name) not in self._stand_ins:
            names = {"__module__": module, "__qualname__": name}
            self._stand_ins[module, name] = type(name.rpartition(".")[2], (_StandIn,), names)
        return self._stand_ins[module, name]


def _rebuild_on_host(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], _device: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def _open_on_host(body: bytes, fetched: list[torch.Tensor], _devices: list[str]) -> Any:
    return _Reader(body, fetched).load()


_ON_HOST: dict[str, Any] = {
    "lightning_ckptless.formats.packing.rebuild_tensor": _rebuild_on_host,
    BUNDLE: _open_on_host,
    PACKED: bytes,
}
"""Replacements that read tensors on the host, as device memory is reserved for training."""


_PurePickler: Any = pickle._Pickler


class _Writer(_PurePickler):  # type: ignore[misc]
    """Writes stand-ins by the names of the original classes.

    Based on the pickler written in Python, since the one in C looks up each name before it writes it.
    """

    def save_global(self, value: Any, name: str | None = None) -> None:
        """Write a class or function by name."""
        if not (isinstance(value, type) and issubclass(value, _StandIn)):
            super().save_global(value, name)
            return
        outer, _, inner = value.__qualname__.rpartition(".")
        if outer:
            owner = type(outer, (_StandIn,), {"__module__": value.__module__, "__qualname__": outer})
            self.save_reduce(getattr, (owner, inner), obj=value)
        else:
            self.write(pickle.GLOBAL + f"{value.__module__}\n{value.__qualname__}\n".encode())
            self.memoize(value)


PICKLE_MODULE = SimpleNamespace(Pickler=_Writer, __name__="pickle")
"""A pickle module for `torch.save` that writes stand-ins."""


def read_pickle(data: bytes, named: Mapping[str, torch.Tensor] | None = None) -> Any:
    """Read a pickle without looking up classes of the script.

    Args:
        data: the pickle.
        named: tensors that it refers to by name.

    Raises:
        DurableError: the pickle is damaged.
    """
    try:
        require_usual(data)
        return _Reader(data, named or ()).load()
    except DAMAGED as error:
        raise DurableError(f"cannot read a pickled state: {error!r}") from error
