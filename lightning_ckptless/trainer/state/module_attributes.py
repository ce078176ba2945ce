"""Attributes of the model's submodules, and which parameters are trainable.

A counter in a layer, a scheduled dropout rate, a hidden state kept between steps, a backbone that is unfrozen after
some epochs: none of them is in a `state_dict`.
"""

from __future__ import annotations

from operator import getitem, is_
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ckptless.internals.torch_internals import version_counter
from lightning_ckptless.trainer.state.attribute_reader import AttributeReader
from lightning_ckptless.trainer.state.plain_values import set_plain_attributes
from lightning_ckptless.trainer.state.rng import generators_of, set_owned_generators

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class ModuleAttributes:
    """Captures and restores the plain attributes of all submodules.

    For torch's own classes these are numbers and booleans only: there are many such modules, and nothing else in them
    changes. Tensors are captured only if they were replaced or written to, so that large tables are not mirrored with
    every step.

    Args:
        root: the model. Its own attributes and metrics are captured elsewhere.
    """

    def __init__(self, root: nn.Module) -> None:
        submodules = [(name, m) for name, m in root.named_modules() if m is not root and not isinstance(m, Metric)]
        self._of_torch = [(name, vars(m), _numbers(m)) for name, m in submodules if _is_of_torch(m)]
        self._of_others = {name: m for name, m in submodules if not _is_of_torch(m)}
        self._with_generators = {name: m for name, m in self._of_others.items() if generators_of(m)}
        self._readers = {name: AttributeReader(m, _OF_EVERY_MODULE) for name, m in self._of_others.items()}
        self._parameters = list(root.parameters())
        self._tensors = {name: _tensors(m) for name, m in self._of_others.items()}
        self._dicts = [attributes for _, attributes, keys in self._of_torch for _ in keys]
        self._keys = [key for _, _, keys in self._of_torch for key in keys]
        self._seen: tuple[list[Any], list[bool]] = [], []
        self._numbers: dict[str, list[Any]] = {}
        self._own_changes = 0

    @property
    def changes(self) -> int:
        """Number of captures that differed, or may have differed, from the one before."""
        return self._own_changes + sum(reader.changes for reader in self._readers.values())

    def capture(self) -> dict[str, Any]:
        """Return the current attributes. They refer to live objects: pack them before training continues."""
        values = list(map(getitem, self._dicts, self._keys))
        trained = [parameter.requires_grad for parameter in self._parameters]
        is_same = len(values) == len(self._seen[0]) and all(map(is_, values, self._seen[0]))
        if not is_same or not self._numbers:
            self._numbers = {
                name: [attributes[key] for key in keys] for name, attributes, keys in self._of_torch if keys
            }
        # The state of a generator changes unnoticed.
        self._own_changes += not is_same or trained != self._seen[1] or bool(self._with_generators)
        self._seen = values, trained
        return {
            "numbers": self._numbers,
            "plain": {name: self._plain(name, reader) for name, reader in self._readers.items()},
            "generators": {name: self._readers[name].generators() for name in self._with_generators},
            "trained": trained,
        }

    def _plain(self, name: str, reader: AttributeReader) -> dict[str, Any]:
        first, taken = self._tensors[name], reader.plain()
        if not first:
            return taken
        return {key: value for key, value in taken.items() if not _is_same(value, first.get(key))}

    def apply(self, saved: dict[str, Any]) -> None:
        """Restore the attributes in a model that was built in the same way."""
        for name, attributes, keys in self._of_torch:
            attributes.update(zip(keys, saved["numbers"].get(name, ()), strict=False))
        for name, plain in saved["plain"].items():
            set_plain_attributes(self._of_others[name], plain)
        for name, owned in saved["generators"].items():
            set_owned_generators(self._with_generators[name], owned)
        for parameter, trained in zip(self._parameters, saved["trained"], strict=True):
            parameter.requires_grad_(trained)


def _is_of_torch(module: nn.Module) -> bool:
    # Check all bases: fully_shard derives torch classes from the classes of sharded modules.
    return all(base.__module__.startswith("torch.") for base in type(module).__mro__[:-1])


def _numbers(module: nn.Module) -> tuple[str, ...]:
    return tuple(
        key for key, value in vars(module).items() if key not in _OF_EVERY_MODULE and isinstance(value, int | float)
    )


def _tensors(module: nn.Module) -> dict[str, tuple[Tensor, int]]:
    return {key: (value, version_counter(value)) for key, value in vars(module).items() if isinstance(value, Tensor)}


def _is_same(value: Any, first: tuple[Tensor, int] | None) -> bool:
    return first is not None and value is first[0] and version_counter(value) == first[1]
