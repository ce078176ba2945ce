"""The two distributions of Lightning, `lightning.pytorch` and `pytorch_lightning`: equal in code, not in classes."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

LIGHTNING = "lightning.pytorch"
PYTORCH_LIGHTNING = "pytorch_lightning"
FLAVOURS = (LIGHTNING, PYTORCH_LIGHTNING)


def flavour_of(trainer: object) -> str:
    """The distribution that an object's class, or one of its bases, comes from."""
    for base in type(trainer).__mro__:
        for flavour in FLAVOURS:
            if base.__module__ == flavour or base.__module__.startswith(f"{flavour}."):
                return flavour
    return imported_flavour()


def imported_flavour() -> str:
    """The distribution that this process has imported; `lightning.pytorch` where both or none are."""
    for flavour in FLAVOURS:
        if flavour in sys.modules:
            return flavour
    return LIGHTNING


def module(flavour: str, name: str = "") -> ModuleType:
    """A module of one distribution, e.g. `module("pytorch_lightning", "callbacks")`."""
    return importlib.import_module(f"{flavour}.{name}" if name else flavour)


def fabric_module(flavour: str, name: str) -> ModuleType:
    """A module of the fabric that belongs to a distribution."""
    fabric = "lightning.fabric" if flavour == LIGHTNING else "lightning_fabric"
    return importlib.import_module(f"{fabric}.{name}")


def is_a(value: Any, module_name: str, class_name: str) -> bool:
    """Whether a value is an instance of a class of either distribution."""
    for flavour in FLAVOURS:
        if (loaded := sys.modules.get(f"{flavour}.{module_name}")) is not None:
            cls = getattr(loaded, class_name, None)
            if cls is not None and isinstance(value, cls):
                return True
    return False


_PARTS_OF_A_RUN = (
    ("trainer.trainer", "Trainer"),
    ("core.module", "LightningModule"),
    ("core.datamodule", "LightningDataModule"),
    ("callbacks", "Callback"),
    ("strategies", "Strategy"),
    ("loggers", "Logger"),
)


def is_part_of_a_run(value: Any) -> bool:
    """Whether a value is a trainer or one of the objects that are handed to one."""
    return any(is_a(value, *kind) for kind in _PARTS_OF_A_RUN)
