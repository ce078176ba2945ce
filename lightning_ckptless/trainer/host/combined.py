"""How far a combined loader is: one or more dataloaders behind one iterator, by names of their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def begin(loader: Any) -> None:
    """Make new iterators of all its dataloaders; worker processes of the last ones are ended."""
    loader.reset()
    iter(loader)


def place_of(loader: Any) -> dict[str, Any]:
    """Batches handed out, and which of its dataloaders have been through once."""
    iterator = loader._iterator
    return {"index": getattr(iterator, "_idx", 0), "consumed": list(getattr(iterator, "_consumed", ()))}


def set_place(loader: Any, index: int, consumed: Sequence[bool]) -> None:
    """Put back what `place_of` took; its dataloaders are there already."""
    iterator = loader._iterator
    if hasattr(iterator, "_idx"):
        iterator._idx = index
    if hasattr(iterator, "_consumed"):
        iterator._consumed = list(consumed)


def iterators_of(loader: Any) -> list[Any]:
    """The iterators of its dataloaders, in their order."""
    return list(loader._iterator.iterators)
