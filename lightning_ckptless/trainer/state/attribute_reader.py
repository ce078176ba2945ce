"""Reads the plain attributes and the generators of an object at every version, looking only at what may have changed.

Which attributes are plain is found out at the first reading. It is found out again for those that were replaced, or
that are containers whose contents have changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from lightning_ckptless.trainer.state.attribute_snapshot import CONTAINERS, AttributeSnapshot, items_of
from lightning_ckptless.trainer.state.object_attributes import has_plain_items
from lightning_ckptless.trainer.state.plain_values import is_plain, plain_attributes
from lightning_ckptless.trainer.state.refilling import can_be_refilled, refilled
from lightning_ckptless.trainer.state.rng import GENERATORS, generators_of, state_of


class AttributeReader:
    """Reads one object.

    Args:
        owner: a module, callback or datamodule.
        leave: names of attributes to exclude.
        tell: called once with the name of each container that has changed and is not plain, such as a list of objects.

    Attributes:
        owner: returns the object.
        seen: its attributes as of the last look.
        is_usual: see `watch.Watched`.
        has_marks: see `watch.Watched`.
        changes: number of readings that differed, or may have differed, from the one before.
        held: names of the attributes that have been the same object since the first reading, as of the last one.
        others: names of the attributes that are not plain, as of the last reading.
    """

    def __init__(
        self, owner: object, leave: Collection[str] = (), tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self.changes = 0
        self.is_usual = hasattr(owner, "__dict__")
        self.has_marks = False
        self._tell = tell
        self._owner = owner
        self.owner = _reference_to(owner)
        self._leave = frozenset(leave)
        self.seen = AttributeSnapshot(self._leave)
        self._plain: dict[str, Any] = {}
        self._generators: dict[str, Any] = {}
        first = plain_attributes(owner, leave=self._leave)
        self._first = {name: value for name, value in first.items() if can_be_refilled(value)}
        self._told: set[str] = set()
        attributes = getattr(owner, "__dict__", {})
        self._lost_at_first = {
            name for name, value in attributes.items() if name not in self._leave and _is_lost(value)
        }
        self.held = list(self._first)
        self.others: list[str] = []

    def plain(self) -> dict[str, Any]:
        """Return what `plain_attributes` returns, as a dictionary that later readings change."""
        if self.seen.is_quiet:
            return self._plain
        attributes = getattr(self._owner, "__dict__", {})
        names = self.seen.look(attributes)
        if names is None or names:
            self._keep({name for name, value in self._first.items() if attributes.get(name) is value})
        if names is None or any(self._is_other(name, attributes[name]) for name in names):
            self._tell_of_others(attributes, names)
            self.changes += 1
            self._plain = plain_attributes(self._owner, leave=self._leave)
            self._generators = generators_of(self._owner)
            self.others = [name for name in attributes if name not in self._plain and name not in self._leave]
            return self._plain
        self._tell_of_others(attributes, [name for name in names if name not in self._plain])
        changed = {name: attributes[name] for name in names if name in self._plain}
        self._plain.update(changed)
        self.changes += bool(changed)
        return self._plain

    def is_as_marked(self) -> bool:
        """See `watch.Watched`."""
        return True

    def put(self, saved: Mapping[str, Any], held: Collection[str], others: Collection[str]) -> None:
        """Restore the plain attributes: in place where they are, and were then, the objects of the first reading.

        Args:
            saved: what `plain` returned, perhaps in another process. It may be changed.
            held: `held` at that time.
            others: `others` at that time. Plain attributes that did not exist then are removed.
        """
        self.changes += 1
        attributes = getattr(self._owner, "__dict__", {})
        for name in plain_attributes(self._owner, leave={*self._leave, *saved, *others}):
            del attributes[name]
        there = {name: self._first[name] for name in held if name in self._first}
        attributes.update(refilled(there, saved))
        self._keep({name for name, value in there.items() if attributes.get(name) is value})

    def generators(self) -> dict[str, Any]:
        """Return what `owned_generators` returns, for the attributes as of the last call of `plain`."""
        return {name: state_of(generator) for name, generator in self._generators.items()}

    def _keep(self, names: Collection[str]) -> None:
        if len(names) < len(self._first):
            self._first = {name: value for name, value in self._first.items() if name in names}
            self.held = list(self._first)

    def _tell_of_others(self, attributes: Mapping[str, Any], changed: Collection[str] | None) -> None:
        """Name the containers that cannot be captured among the attributes that have changed, or are new."""
        if changed is None:
            changed = attributes.keys() - self._plain.keys() - self._leave - self._lost_at_first
        for name in changed:
            if name not in self._told and _is_lost(attributes[name]):
                self._told.add(name)
                self._tell(name)

    def _is_other(self, name: str, value: Any) -> bool:
        """Return whether an attribute has become plain or ceased to be, or was or is a generator."""
        is_other = is_plain(value) != (name in self._plain)
        return is_other or name in self._generators or isinstance(value, GENERATORS)


def _reference_to(owner: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(owner)
    except TypeError:
        # Its class has slots.
        return lambda: owner


def _is_lost(value: Any) -> bool:
    """Return whether a value is a container of data that is captured neither here nor as an object of the script."""
    if not isinstance(value, CONTAINERS) or is_plain(value) or has_plain_items(value):
        return False
    return not all(isinstance(part, (*_NO_DATA, str)) or callable(part) for part in items_of(value))


_NO_DATA = (torch.Tensor, nn.Module, torch.optim.Optimizer)
"""Captured elsewhere."""
