"""Reading a host state without the program that has written it, and without running any code of it.

Beside plain data it may hold a class or a function of the program: a data class among the hyper-parameters, a loss in
an attribute. What is not plain data is never looked up here, even where its module could be imported: a class of the
same name stands in for it, keeps what it is given, and is written as it was read. So the program finds its own class
again in a checkpoint that is made of it.
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
from lightning_ckptless.formats.pickles import BUNDLE, DAMAGED, MEMBER, PACKED, is_safe, require_usual


class _StandIn:
    """An object of a class that is not looked up. Pickle makes objects by a call, or without one."""

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
        """Take an item, where it stands in for a list."""
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
    """Reads on the host what refers to a device or to classes of a program.

    Args:
        data: what was pickled.
        aside: tensors that stand beside it, by number or by name.
    """

    def __init__(self, data: bytes, aside: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] = ()) -> None:
        super().__init__(io.BytesIO(data))
        self._aside = aside
        self._stand_ins: dict[tuple[str, str], type] = {}

    def persistent_load(self, place: Any) -> torch.Tensor:
        """A tensor that stands beside the rest."""
        tensor: torch.Tensor = self._aside[place]
        return tensor

    def find_class(self, module: str, name: str) -> Any:
        """Plain data as it is, and what stands in for anything else."""
        whole = f"{module}.{name}"
        if whole in _ON_HOST:
            return _ON_HOST[whole]
        if whole == MEMBER:
            return self._member
        return getattr(importlib.import_module(module), name) if is_safe(whole) else self._stand_in(module, name)

    def _member(self, module: str, name: str, value: Any) -> Any:
        return self._stand_in(module, name)(value)

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
"""How small tensors are read without the device that they were on: its memory is the training's."""


_PurePickler: Any = pickle._Pickler


class _Writer(_PurePickler):  # type: ignore[misc]
    """Writes stand-ins by the names of what they stand for.

    It is the pickler that is written in Python: the other one looks up each name before it writes it.
    """

    def save_global(self, value: Any, name: str | None = None) -> None:
        """Write a name."""
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
"""What `torch.save` writes stand-ins with."""


def read_pickle(data: bytes, named: Mapping[str, torch.Tensor] | None = None) -> Any:
    """What was pickled by a program whose classes are not looked up.

    Args:
        data: the pickle.
        named: tensors that it refers to by name.

    Raises:
        DurableError: it is damaged.
    """
    try:
        require_usual(data)
        return _Reader(data, named or ()).load()
    except DAMAGED as error:
        raise DurableError(f"a pickled state cannot be read: {error!r}") from error
