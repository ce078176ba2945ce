"""The position of a combined loader (several dataloaders in one iterator), and iteration through stand-ins."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Sequence
from operator import is_, itemgetter
from typing import Any

_FIRST, _SECOND = itemgetter(0), itemgetter(1)
_STAND_INS = "_ckptless_stand_ins"
_STAND_IN = "_ckptless_stand_in"
_CLASSES: dict[type, type] = {}


def iterate_through(loader: Any, stand_in: Callable[[Any], Any]) -> Any:
    """Return a combined loader that iterates over stand-ins of the same dataloaders.

    The dataloaders and the given combined loader are not changed.

    Args:
        loader: combined loader of either distribution.
        stand_in: creates the stand-in of a dataloader.
    """
    cls = _class_over(type(loader))
    made = cls.__new__(cls)
    vars(made).update(vars(loader), **{_STAND_IN: stand_in, _STAND_INS: []})
    return made


def stand_ins(loader: Any) -> list[Any]:
    """Return the stand-ins of the dataloaders in order; the dataloaders themselves if there are none."""
    made = vars(loader).get(_STAND_INS)
    if made is None:
        return list(loader.flattened)
    flattened = loader.flattened
    if len(made) == len(flattened) and all(map(is_, map(_FIRST, made), flattened)):
        return list(map(_SECOND, made))
    known, make = {id(original): stand_in for original, stand_in in made}, vars(loader)[_STAND_IN]
    made[:] = [(original, known[id(original)] if id(original) in known else make(original)) for original in flattened]
    return [stand_in for _, stand_in in made]


def iterate_directly(loader: Any) -> None:
    """Undo `iterate_through` in a combined loader that it has returned."""
    if vars(loader).pop(_STAND_INS, None) is not None:
        del vars(loader)[_STAND_IN]
        loader.__class__ = type(loader).__base__


def _class_over(base: Any) -> Any:
    if base in _CLASSES:
        return _CLASSES[base]

    def make_iterators(self: Any) -> Any:
        dataloaders, self._flattened = self._flattened, stand_ins(self)
        try:
            return base.__iter__(self)
        finally:
            self._flattened = dataloaders

    def reduce(self: Any, _protocol: Any) -> Any:
        state = {name: value for name, value in vars(self).items() if name not in {_STAND_IN, _STAND_INS}}
        return copyreg.__newobj__, (base,), state  # type: ignore[attr-defined]

    members = {"__iter__": make_iterators, "__reduce_ex__": reduce, "__module__": base.__module__}
    _CLASSES[base] = type(base.__name__, (base,), members | {"__qualname__": base.__qualname__})
    return _CLASSES[base]


def begin(loader: Any) -> None:
    """Create new iterators of all dataloaders; worker processes of the previous ones exit."""
    loader.reset()
    iter(loader)


def place_of(loader: Any) -> dict[str, Any]:
    """Return the number of batches returned, and which of the dataloaders have been exhausted once."""
    iterator = loader._iterator
    return {"index": getattr(iterator, "_idx", 0), "consumed": list(getattr(iterator, "_consumed", ()))}


def set_place(loader: Any, index: int, consumed: Sequence[bool]) -> None:
    """Restore the result of `place_of`; the dataloaders must be at this position already."""
    iterator = loader._iterator
    if hasattr(iterator, "_idx"):
        iterator._idx = index
    if hasattr(iterator, "_consumed"):
        iterator._consumed = list(consumed)


def iterators_of(loader: Any) -> list[Any]:
    """Return the iterators of the dataloaders, in order."""
    return list(loader._iterator.iterators)
