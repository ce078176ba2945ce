"""Watches the fetcher that passes batches to the epoch loop, and copies the containers of batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from lightning_ckptless.internals.lightning.distribution import is_a
from lightning_ckptless.internals.torch_internals import map_tensors, version_counter


class Fetches(Protocol):
    """Receives the requests for batches."""

    def fetch(self, fetch: Callable[[], Any]) -> Any:
        """Return the next batch, from `fetch` or another source."""

    def reset(self) -> None:
        """Handle that the data is opened again."""


_LOG = "_ckptless_batches"
_CLASSES: dict[type, type] = {}


def watch_fetches(fetcher: Any, log: Fetches) -> bool:
    """Make a fetcher request each batch through a log.

    The object stays the same; its class is replaced by a subclass.

    Returns:
        False for a fetcher that returns its own iterator instead of batches.
    """
    if is_a(fetcher, "loops.fetchers", "_DataLoaderIterDataFetcher"):
        return False
    vars(fetcher)[_LOG] = log
    base = type(fetcher)
    if not hasattr(base, _LOG):
        fetcher.__class__ = _watched_class(base)
    return True


def _blank(cls: Any) -> Any:
    """Create an object without attributes, for unpickling."""
    return cls.__new__(cls)


def _watched_class(base: Any) -> type:
    if base not in _CLASSES:

        def next_batch(self: Any) -> Any:
            return vars(self)[_LOG].fetch(lambda: base.__next__(self))

        def reopen(self: Any) -> Any:
            vars(self)[_LOG].reset()
            return base.__iter__(self)

        def copy_of_base(self: Any, _: Any) -> Any:
            # A copy or pickle of the loops gets a fetcher of Lightning's own class, without the log.
            state = {name: value for name, value in vars(self).items() if name != _LOG}
            return _blank, (base,), state

        members = {"__next__": next_batch, "__iter__": reopen, "__reduce_ex__": copy_of_base, _LOG: None}
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        _CLASSES[base] = type(base.__name__, (base,), members | names)
    return _CLASSES[base]


def copy_containers(data: Any) -> tuple[Any, tuple[int, ...], int]:
    """Copy the containers of nested data, but not the tensors in them.

    Returns:
        The copy, the version counter of each tensor, and their total size in bytes.
    """
    found: list[Tensor] = []
    copy = _copied(data, found)
    return copy, tuple(map(version_counter, found)), sum(tensor.nbytes for tensor in found)


def _copied(data: Any, found: list[Tensor]) -> Any:
    kind = type(data)
    if kind is list or kind is tuple:
        return kind([_copied(item, found) for item in data])
    if kind is dict:
        return {key: _copied(item, found) for key, item in data.items()}

    def same(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    # Other containers take torch ten times as long.
    return same(data) if isinstance(data, Tensor) else map_tensors(same, data)
