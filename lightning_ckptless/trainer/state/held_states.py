"""States of objects of torch that the script holds and the trainer does not know.

These are the optimizer of a probe, its scheduler, a gradient scaler, a generator in a dictionary, or a metric or a
teacher that is kept in a list, so that it is not part of the model. They are captured by their `state_dict` if that is
small, and restored if it differs. A module is captured only once it is not what it was in the beginning.
"""

from __future__ import annotations

import copy
import pickle
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ckptless.formats.packing import pack
from lightning_ckptless.internals.lightning.metrics import dump_metric, load_metric, metrics_of
from lightning_ckptless.internals.torch_internals import leaves_of, version_counter
from lightning_ckptless.trainer.state.layout_tensors import digest_of
from lightning_ckptless.trainer.state.object_attributes import ITEMS, attributes_of
from lightning_ckptless.trainer.state.plain_values import HEAVY_BYTES, is_same
from lightning_ckptless.trainer.state.reachability import MOST_ITEMS
from lightning_ckptless.trainer.state.rng import GENERATORS, set_state, state_of
from lightning_ckptless.trainer.state.unreadable import is_unreadable

_WITH_STATE_DICT = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
_KINDS = (nn.Module, *_WITH_STATE_DICT, *GENERATORS)
_DEEPEST = 3
_FULL_COMPARISONS = 3
"""Captures in which a module that is large or on a device is compared in full; later ones rely on torch's count of
writes."""


class HeldStates:
    """The objects that are there when training begins.

    Args:
        roots: attributes to search, by path.
        known: identities of objects that are captured elsewhere.
        is_own: returns whether a value is an object of the script, whose attributes are searched too.

    Attributes:
        unreadable: paths of objects whose state cannot be read.
    """

    def __init__(
        self, roots: Mapping[str, Mapping[str, Any]], known: Collection[int], is_own: Callable[[Any], bool]
    ) -> None:
        every = [(path, held) for path, held in _search(roots, is_own) if id(held) not in known]
        self.unreadable = [path for path, held in every if not isinstance(held, _KINDS)]
        readable = (isinstance(held, _KINDS) and _is_readable(held) for _, held in every)
        found = list(compress(every, readable))
        self._modules = {path: _WatchedModule(held) for path, held in found if isinstance(held, nn.Module)}
        self._others = {path: held for path, held in found if not isinstance(held, nn.Module)}
        for path, watched in self._modules.items():
            # The states of metrics are not part of a `state_dict`.
            self._others |= metrics_of((f"{path}:{name}", inner) for name, inner in watched.module.named_modules())
        self._lost: list[str] = []

    def capture(self) -> dict[str, Any]:
        """Return the states that may have changed. They refer to live objects."""
        found = {path: _read(held) for path, held in self._others.items()}
        changed = [path for path, watched in self._modules.items() if watched.has_changed()]
        found |= {path: self._modules[path].module.state_dict() for path in changed if not self._modules[path].is_large}
        for path in changed:
            if self._modules[path].is_large:
                self._lost.append(path)
                del self._modules[path]
        for path in [path for path in self._others if _bytes_of(found[path]) > HEAVY_BYTES]:
            self._lost.append(path)
            del self._others[path], found[path]
        return found

    def apply(self, saved: Mapping[str, Any]) -> None:
        """Restore what `capture` returned."""
        for path, watched in self._modules.items():
            if path in saved or watched.has_changed():
                _write(watched.module, saved.get(path, watched.first))
        for path, held in self._others.items():
            if path in saved:
                _write(held, saved[path])

    def lost(self) -> list[str]:
        """Return the objects that have changed since the last call and are too large to be captured, each once."""
        new, self._lost = self._lost, []
        return new


class _WatchedModule:
    """A module, and whether it is still what it was in the beginning.

    Args:
        module: the module.

    Attributes:
        module: the module.
        first: its first `state_dict`; None if it is large.
        is_large: whether its state is too large to be captured with every step.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.is_large = _bytes_of(module.state_dict()) > HEAVY_BYTES
        self.first = None if self.is_large else copy.deepcopy(module.state_dict())
        self._is_quick = not self.is_large and all(tensor.device.type == "cpu" for tensor in self._tensors())
        self._left = _FULL_COMPARISONS
        self._writes, self._digests = self._count(), self._digest()

    def has_changed(self) -> bool:
        """Return whether the module differs from what it was; later on, as far as torch counts writes to it."""
        self._left -= 1
        if self._count() != self._writes or self._is_quick or self._left >= 0:
            return self._digest() != self._digests
        return False

    def _count(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), version_counter(tensor)) for tensor in self._tensors()]

    def _digest(self) -> list[str]:
        return [digest_of(tensor) for tensor in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]


def _is_readable(held: Any) -> bool:
    """Return whether the state of an object can be pickled; that of a scheduler may contain a function."""
    try:
        if not isinstance(held, nn.Module):
            pack(_read(held))
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def _read(held: Any) -> Any:
    if isinstance(held, Metric):
        return dump_metric(held)
    return state_of(held) if isinstance(held, GENERATORS) else held.state_dict()


def _write(held: Any, state: Any) -> None:
    if state is None:
        return
    if isinstance(held, Metric) and "states" in state:
        load_metric(held, copy.deepcopy(state))
    elif isinstance(held, GENERATORS):
        set_state(held, state)
    elif not is_same(held.state_dict(), state):
        held.load_state_dict(copy.deepcopy(state))


def _bytes_of(state: Any) -> int:
    return sum(leaf.nbytes for leaf in leaves_of(state) if isinstance(leaf, Tensor))


def _search(roots: Mapping[str, Mapping[str, Any]], is_own: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    waiting = [(f"{path}.{name}", value, 0) for path, held in roots.items() for name, value in held.items()]
    seen: set[int] = set()
    while waiting:
        path, value, depth = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _KINDS) or is_unreadable(value):
            yield path, value
        elif depth < _DEEPEST:
            waiting += [(f"{path}{name}", part, depth + 1) for name, part in _parts_of(value, is_own)]


def _parts_of(value: Any, is_own: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    parts: list[tuple[str, Any]] = []
    if isinstance(value, list | tuple | dict | deque) and len(value) <= MOST_ITEMS:
        items = list(value.items()) if isinstance(value, dict) else enumerate(value)
        parts += [(f"[{key!r}]", part) for key, part in items]
    if is_own(value):
        parts += [(f".{name}", part) for name, part in attributes_of(value).items() if name != ITEMS]
    return parts
