"""Attributes of the model's submodules, and which parameters are trainable.

A counter in a layer, a scheduled dropout rate, a hidden state kept between steps, a backbone that is unfrozen after
some epochs: none of them is in a `state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter, getitem, is_
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ckptless.internals.lightning.metrics import attributes_of_state
from lightning_ckptless.internals.torch_internals import version_counter
from lightning_ckptless.trainer.state.attribute_reader import AttributeReader
from lightning_ckptless.trainer.state.attribute_snapshot import UNKNOWN, quiet_of
from lightning_ckptless.trainer.state.plain_values import HEAVY_BYTES, is_plain
from lightning_ckptless.trainer.state.rng import generators_of, set_owned_generators

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_CHANGES, _SEEN = attrgetter("changes"), attrgetter("seen")


class ModuleAttributes:
    """Captures and restores the plain attributes of all submodules.

    For torch's own classes these are numbers and booleans only: there are many such modules, and nothing else in them
    changes. Tensors are captured only if they were replaced or written to, so that large tables are not mirrored with
    every step.

    Args:
        root: the model. Its own attributes and the states of metrics are captured elsewhere.
        tell: called with the path of a module and the name of a container in it that cannot be captured.
    """

    def __init__(self, root: nn.Module, tell: Callable[[str, str], None] = lambda *_: None) -> None:
        submodules = [(name, m) for name, m in root.named_modules() if m is not root]
        self._of_torch = [(name, vars(m), _numbers(m)) for name, m in submodules if _is_of_torch(m)]
        self._of_others = {name: m for name, m in submodules if not _is_of_torch(m)}
        self._with_generators = {name: m for name, m in self._of_others.items() if generators_of(m)}
        self._readers = {
            name: AttributeReader(m, _left_out(m), partial(tell, name)) for name, m in self._of_others.items()
        }
        self._parameters = list(root.parameters())
        self._tensors = {name: found for name, m in self._of_others.items() if (found := _tensors(m))}
        self._dicts = [attributes for _, attributes, keys in self._of_torch for _ in keys]
        self._keys = [key for _, _, keys in self._of_torch for key in keys]
        self._seen: tuple[list[Any], list[bool]] = [], []
        self._numbers: dict[str, list[Any]] = {}
        self._own_changes = 0
        self._facts_at = -1
        self._held: dict[str, list[str]] = {}
        self._other_names: dict[str, list[str]] = {}
        self._of_readers: dict[str, Any] | None = None
        self._quiet = UNKNOWN

    @property
    def readers(self) -> Collection[AttributeReader]:
        """Those of the submodules that are not torch's own."""
        return self._readers.values()

    @property
    def changes(self) -> int:
        """Number of captures that differed, or may have differed, from the one before."""
        of_readers: int = sum(map(_CHANGES, self._readers.values()))
        return self._own_changes + of_readers

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
        if not self._quiet.is_now:
            self._quiet = quiet_of(map(_SEEN, self._readers.values()))
        if self._of_readers is None or not self._quiet.is_now:
            self._of_readers = self._read()
        return {
            "numbers": self._numbers,
            **self._of_readers,
            "generators": {name: self._readers[name].generators() for name in self._with_generators},
            "trained": trained,
        }

    def _read(self) -> dict[str, Any]:
        plain = {name: reader.plain() for name, reader in self._readers.items()}
        unchanged = {
            name: [key for key in first if key in plain[name] and first[key].is_still(plain[name][key])]
            for name, first in self._tensors.items()
        }
        for name, keys in unchanged.items():
            plain[name] = {key: value for key, value in plain[name].items() if key not in keys}
        if (changes := self.changes) != self._facts_at:
            self._facts_at = changes
            self._held = {name: reader.held for name, reader in self._readers.items() if reader.held}
            self._other_names = {name: reader.others for name, reader in self._readers.items() if reader.others}
        return {"plain": plain, "unchanged": unchanged, "held": self._held, "others": self._other_names}

    def apply(self, saved: dict[str, Any]) -> None:
        """Restore the attributes in a model that was built in the same way."""
        for name, attributes, keys in self._of_torch:
            attributes.update(zip(keys, saved["numbers"].get(name, ()), strict=False))
        for name, plain in saved["plain"].items():
            self._restore(name, plain, saved)
        for name, owned in saved["generators"].items():
            set_owned_generators(self._with_generators[name], owned)
        for parameter, trained in zip(self._parameters, saved["trained"], strict=True):
            parameter.requires_grad_(trained)

    def _restore(self, name: str, plain: dict[str, Any], saved: dict[str, Any]) -> None:
        reader, attributes, first = self._readers[name], vars(self._of_others[name]), self._tensors.get(name, {})
        unchanged = saved["unchanged"].get(name, ())
        differing = [key for key in unchanged if not first[key].is_still(attributes.get(key))]
        copies = {key: copy.clone() for key in differing if (copy := first[key].copy) is not None}
        reader.put(copies | plain, saved["held"].get(name, ()), {*saved["others"].get(name, ()), *unchanged})
        for key in copies:
            first[key] = replace(first[key], value=attributes[key], writes=version_counter(attributes[key]))


@dataclass(frozen=True, slots=True)
class _First:
    """A tensor as it was when the model was first seen.

    Args:
        value: the tensor.
        writes: torch's count of writes to it.
        copy: its values, with which a later change is undone; None if that would take too much memory.
    """

    value: Tensor
    writes: int
    copy: Tensor | None

    def is_still(self, value: Any) -> bool:
        """Return whether an attribute is this tensor, and unchanged."""
        return value is self.value and version_counter(value) == self.writes


def _is_of_torch(module: nn.Module) -> bool:
    # Check all bases: fully_shard derives torch classes from the classes of sharded modules.
    return all(base.__module__.startswith("torch.") for base in type(module).__mro__[:-1])


def _left_out(module: nn.Module) -> frozenset[str]:
    return _OF_EVERY_MODULE | (attributes_of_state(module) if isinstance(module, Metric) else frozenset())


def _numbers(module: nn.Module) -> tuple[str, ...]:
    return tuple(
        key for key, value in vars(module).items() if key not in _OF_EVERY_MODULE and isinstance(value, int | float)
    )


def _tensors(module: nn.Module) -> dict[str, _First]:
    found = {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
    return {key: _First(value, version_counter(value), _copy(value)) for key, value in found.items()}


def _copy(value: Tensor) -> Tensor | None:
    return value.detach().clone() if is_plain(value) and value.nbytes <= HEAVY_BYTES else None
