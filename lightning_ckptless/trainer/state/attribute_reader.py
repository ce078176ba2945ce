"""Reads the plain attributes and the generators of an object at every version, looking only at what may have changed.

Which attributes are plain is found out at the first reading. It is found out again for those that were replaced, or
that are containers whose contents have changed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lightning_ckptless.trainer.state.plain_values import is_plain, plain_attributes
from lightning_ckptless.trainer.state.rng import GENERATORS, generators_of, state_of
from lightning_ckptless.trainer.state.seen import Seen


class AttributeReader:
    """Reads one object.

    Args:
        owner: a module, callback or datamodule.
        leave: names of attributes to exclude.

    Attributes:
        changes: number of readings that differed, or may have differed, from the one before.
    """

    def __init__(self, owner: object, leave: Collection[str] = ()) -> None:
        self.changes = 0
        self._owner = owner
        self._leave = frozenset(leave)
        self._seen = Seen(self._leave)
        self._plain: dict[str, Any] = {}
        self._generators: dict[str, Any] = {}

    def plain(self) -> dict[str, Any]:
        """Return what `plain_attributes` returns, as a dictionary that later readings change."""
        attributes = getattr(self._owner, "__dict__", {})
        names = self._seen.look(attributes)
        if names is None or any(self._is_other(name, attributes[name]) for name in names):
            self.changes += 1
            self._plain = plain_attributes(self._owner, leave=self._leave)
            self._generators = generators_of(self._owner)
            return self._plain
        changed = {name: attributes[name] for name in names if name in self._plain}
        self._plain.update(changed)
        self.changes += bool(changed)
        return self._plain

    def generators(self) -> dict[str, Any]:
        """Return what `owned_generators` returns, for the attributes as of the last call of `plain`."""
        return {name: state_of(generator) for name, generator in self._generators.items()}

    def _is_other(self, name: str, value: Any) -> bool:
        """Return whether an attribute has become plain or ceased to be, or was or is a generator."""
        is_other = is_plain(value) != (name in self._plain)
        return is_other or name in self._generators or isinstance(value, GENERATORS)
