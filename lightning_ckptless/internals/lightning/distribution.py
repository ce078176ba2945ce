"""Which distribution of Lightning defines an object, and the modules of a distribution."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

from lightning_ckptless.distributions import DISTRIBUTIONS, LIGHTNING


def distribution_of(trainer: object) -> str:
    """Return the distribution that defines an object's class or one of its bases."""
    for base in type(trainer).__mro__:
        for distribution in DISTRIBUTIONS:
            if base.__module__ == distribution or base.__module__.startswith(f"{distribution}."):
                return distribution
    return imported_distribution()


def imported_distribution() -> str:
    """Return the distribution that this process has imported; `lightning.pytorch` if both or none."""
    for distribution in DISTRIBUTIONS:
        if distribution in sys.modules:
            return distribution
    return LIGHTNING


def module(distribution: str, name: str = "") -> ModuleType:
    """Import a module of one distribution, e.g. `module("pytorch_lightning", "callbacks")`."""
    return importlib.import_module(f"{distribution}.{name}" if name else distribution)


def fabric_module(distribution: str, name: str) -> ModuleType:
    """Import a module of the Fabric package that belongs to a distribution."""
    fabric = "lightning.fabric" if distribution == LIGHTNING else "lightning_fabric"
    return importlib.import_module(f"{fabric}.{name}")


def is_a(value: Any, module_name: str, class_name: str) -> bool:
    """Return whether a value is an instance of a class of either distribution."""
    return any(isinstance(value, cls) for cls in _imported(module_name, class_name))


@cache
def is_subclass(cls: type, module_name: str, class_name: str) -> bool:
    """Return whether a class is derived from a class of either distribution, or is that class."""
    # The answer lasts: a base of a class has been imported before it.
    return any(issubclass(cls, base) for base in _imported(module_name, class_name))


def _imported(module_name: str, class_name: str) -> Iterator[Any]:
    for distribution in DISTRIBUTIONS:
        if (loaded := sys.modules.get(f"{distribution}.{module_name}")) is not None:
            cls = getattr(loaded, class_name, None)
            if cls is not None:
                yield cls


_PARTS_OF_A_RUN = (
    ("trainer.trainer", "Trainer"),
    ("core.module", "LightningModule"),
    ("core.datamodule", "LightningDataModule"),
    ("callbacks", "Callback"),
    ("strategies", "Strategy"),
    ("loggers", "Logger"),
)


def is_part_of_a_run(value: Any) -> bool:
    """Return whether a value is a trainer or an object that is passed to one."""
    return any(is_a(value, *kind) for kind in _PARTS_OF_A_RUN)
