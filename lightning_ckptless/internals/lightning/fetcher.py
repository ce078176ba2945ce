"""What hands batches to the epoch loop, watched; and the containers that batches come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from lightning_ckptless.internals.lightning.distribution import is_a
from lightning_ckptless.internals.torch_internals import map_tensors, version_counter


class Fetches(Protocol):
    """Who is asked for the next batch."""

    def fetch(self, fetch: Callable[[], Any]) -> Any:
        """The next batch, from `fetch` or from elsewhere."""

    def reset(self) -> None:
        """The data is opened anew."""


_LOG = "_ckptless_batches"
_CLASSES: dict[type, type] = {}


def watch_fetches(fetcher: Any, log: Fetches) -> bool:
    """Ask a log for each batch that a fetcher hands out.

    The object stays the same; its class becomes a subclass of its own.

    Returns:
        False for a fetcher that hands out its own iterator instead of batches.
    """
    if is_a(fetcher, "loops.fetchers", "_DataLoaderIterDataFetcher"):
        return False
    vars(fetcher)[_LOG] = log
    base = type(fetcher)
    if not hasattr(base, _LOG):
        fetcher.__class__ = _watched_class(base)
    return True


def _blank(cls: Any) -> Any:
    """An object without attributes, for what reads a pickle."""
    return cls.__new__(cls)


def _watched_class(base: Any) -> type:
    if base not in _CLASSES:

        def next_batch(self: Any) -> Any:
            return vars(self)[_LOG].fetch(lambda: base.__next__(self))

        def open_anew(self: Any) -> Any:
            vars(self)[_LOG].reset()
            return base.__iter__(self)

        def copy_of_base(self: Any, _: Any) -> Any:
            # What copies or pickles the loops gets a fetcher of Lightning's own class, without the log.
            state = {name: value for name, value in vars(self).items() if name != _LOG}
            return _blank, (base,), state

        members = {"__next__": next_batch, "__iter__": open_anew, "__reduce_ex__": copy_of_base, _LOG: None}
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        _CLASSES[base] = type(base.__name__, (base,), members | names)
    return _CLASSES[base]


def copy_containers(data: Any) -> tuple[Any, tuple[int, ...], int]:
    """Lists, dictionaries and the like anew, with the same tensors in them.

    Returns:
        The copy, how often each tensor was written to, and the bytes of all of them.
    """
    stamps: list[int] = []
    sizes: list[int] = []

    def same(tensor: Tensor) -> Tensor:
        stamps.append(version_counter(tensor))
        sizes.append(tensor.nbytes)
        return tensor

    return map_tensors(same, data), tuple(stamps), sum(sizes)
