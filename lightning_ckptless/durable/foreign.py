"""Reading a small state without the program that has written it.

Plain data may hold a class of the program: an enumeration in an attribute, a data class among the hyper-parameters. Out
here its module may be another one (`__main__`) or not there at all. Such a class is stood in for by one of the same
name, which keeps what it is given and is pickled as it was read, so that the program finds its own class again.
"""

from __future__ import annotations

import copyreg
import importlib
import io
import pickle
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Self

import torch


class _StandIn:
    """An object of a class that is not there. Pickle makes objects by a call, or without one."""

    stood_in_args: tuple[Any, ...]
    stood_in_state: Any = None
    stood_in_was_called: bool = False

    def __new__(cls, *args: Any) -> Self:
        made = super().__new__(cls)
        made.stood_in_args = args
        return made

    def __init__(self, *_: Any) -> None:
        self.stood_in_was_called = True

    def __setstate__(self, state: Any) -> None:
        self.stood_in_state = state

    def __reduce__(self) -> tuple[Any, ...]:
        if self.stood_in_was_called:
            return type(self), self.stood_in_args, self.stood_in_state
        return copyreg.__newobj__, (type(self), *self.stood_in_args), self.stood_in_state  # type: ignore[attr-defined]


def _stand_in(module: str, name: str) -> type:
    """A class of a name, where pickle will look for it."""
    if module not in sys.modules:
        sys.modules[module] = ModuleType(module)
    owner: Any = sys.modules[module]
    *path, last = name.split(".")
    for part in path:
        if not hasattr(owner, part):
            setattr(owner, part, type(part, (), {}))
        owner = getattr(owner, part)
    made = type(last, (_StandIn,), {"__module__": module, "__qualname__": name})
    setattr(owner, last, made)
    return made


class _Unpickler(pickle.Unpickler):
    """Reads on the host what refers to a device or to classes of a program.

    Args:
        data: what was pickled.
        aside: tensors that stand beside it, by number or by name.
    """

    def __init__(self, data: bytes, aside: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] = ()) -> None:
        super().__init__(io.BytesIO(data))
        self._aside = aside

    def persistent_load(self, place: Any) -> torch.Tensor:
        """A tensor that stands beside the rest."""
        tensor: torch.Tensor = self._aside[place]
        return tensor

    def find_class(self, module: str, name: str) -> Any:
        """The class of a name, or one that stands in for it."""
        if (module, name) in _ON_HOST:
            return _ON_HOST[module, name]
        try:
            found: Any = sys.modules.get(module) or importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            return _stand_in(module, name)
        return found


def _rebuild_on_host(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], _device: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def _open_on_host(body: bytes, fetched: list[torch.Tensor], _devices: list[str]) -> Any:
    return _Unpickler(body, fetched).load()


_ON_HOST: dict[tuple[str, str], Any] = {
    ("lightning_ckptless.trainer.plain", "_rebuild"): _rebuild_on_host,
    ("lightning_ckptless.trainer.late_packing", "_open"): _open_on_host,
}
"""How small tensors are read without the device that they were on: its memory is the training's."""


def read_pickle(data: bytes, named: Mapping[str, torch.Tensor] | None = None) -> Any:
    """What was pickled by a program whose modules may not be there.

    Args:
        data: the pickle.
        named: tensors that it refers to by name.
    """
    return _Unpickler(data, named or ()).load()
