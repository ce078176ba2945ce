"""Objects that the module, the callbacks and the datamodule hold: a queue, a tracker, a schedule of the user's own.

What is plain in an object of the user's own code returns to a version with the run. Of objects of installed packages
nothing is put back: they may be clients, connections or caches that know better. Where one of those changes, or any
object is exchanged for another one, a replaced process loses that change, and it is named once.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Collection, Iterator
from operator import is_
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_ckptless.internals.lightning.distribution import distribution_of, is_a, is_part_of_a_run, module
from lightning_ckptless.trainer.state.changes import NAMED_ONLY, OBJECTS_LEFT_ALONE, Changed, Changes
from lightning_ckptless.trainer.state.reachability import reach

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NO_STATE = (
    nn.Module,
    torch.Tensor,
    torch.Generator,
    torch.optim.Optimizer,
    type,
    FunctionType,
    MethodType,
    ModuleType,
)
"""Kept elsewhere, or nothing that training changes."""
_OF_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_ckptless")
_PACKAGES = {"site-packages", "dist-packages"}
_CLIENTS = ("wandb", "mlflow", "comet_ml", "neptune", "aim", "tensorboard", "tensorboardX", "tqdm", "rich")


class UserObjects:
    """Watches them from the end of the `on_train_start` hooks.

    Args:
        trainer: in `fit`.
        known: identities of objects that are watched elsewhere.
    """

    def __init__(self, trainer: Any, known: Collection[int]) -> None:
        roots = dict(_roots(trainer))
        held = list(_held_by(roots, known))
        self._own = Changes(((path, it) for path, it in held if is_users_own(type(it))), policy=OBJECTS_LEFT_ALONE)
        self._installed = Changes(((path, it) for path, it in held if not is_users_own(type(it))), policy=NAMED_ONLY)
        self._references = [_References(path, root, leave) for path, (root, leave) in roots.items()]

    def capture(self) -> Changed:
        """What has changed in objects of the user's own."""
        self._installed.capture()
        return self._own.capture()

    def apply(self, saved: Changed) -> None:
        """Put it back."""
        self._own.apply(saved)

    def lost(self) -> list[str]:
        """What has changed since the last call, each attribute once, and is lost with a process."""
        exchanged = [name for references in self._references for name in references.exchanged()]
        return [*self._own.lost(), *self._installed.lost(), *exchanged]


class _References:
    """The objects that attributes of a module, callback or datamodule refer to; plain values are kept elsewhere."""

    def __init__(self, path: str, root: Any, leave: Collection[str]) -> None:
        self._path = path
        self._attributes = vars(root)
        self._leave = set(leave)
        # Not the tensors: those that are replaced would stay in memory.
        self._first = {name: value for name, value in self._attributes.items() if _is_reference(value)}
        self._values = tuple(self._attributes.values())

    def exchanged(self) -> Iterator[str]:
        """Names of those that refer to another object than at first."""
        if len(self._values) == len(self._attributes) and all(map(is_, self._values, self._attributes.values())):
            return
        self._values = tuple(self._attributes.values())
        for name, value in list(self._attributes.items()):
            if self._first.get(name) is not value and name not in self._leave and _is_reference(value):
                self._leave.add(name)
                yield f"{self._path}.{name}"


def is_users_own(cls: type) -> bool:
    """Whether a class is from the user's code, not from an installed package."""
    return _is_users_module(cls.__module__)


@functools.cache
def _is_users_module(name: str) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None)
    if name == "__main__" or file is None:
        return name == "__main__"
    # An environment may use the packages of another one, whose folders sysconfig does not know.
    if not _PACKAGES.isdisjoint(Path(file).parts):
        return False
    installed = {sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib")}
    return not any(Path(file).is_relative_to(folder) for folder in installed)


def _is_reference(value: Any) -> bool:
    cls: Any = type(value)
    is_object = bool(cls.__dictoffset__) and not isinstance(value, _NO_STATE)
    return is_object and not is_part_of_a_run(value) and not _is_of(cls, (*_CLIENTS, *_OF_LIGHTNING))


def _is_of(cls: type, packages: Collection[str]) -> bool:
    return cls.__module__.partition(".")[0] in packages


def _roots(trainer: Any) -> Iterator[tuple[str, tuple[Any, Collection[str]]]]:
    """What hooks are called on, by path, each with the names of attributes that are Lightning's or torch's."""
    lightning = module(distribution_of(trainer))
    model = trainer.lightning_module
    of_every_model = frozenset(vars(lightning.LightningModule())) | {"_hparams", "_hparams_initial"}
    for path, inner in model.named_modules():
        if inner is model or not _is_of(type(inner), ("torch", "torchmetrics")):
            where = f"{type(model).__name__}.{path}" if path else type(model).__name__
            yield where, (inner, of_every_model if inner is model else _OF_EVERY_MODULE)
    for index, callback in enumerate(trainer.callbacks):
        if not _is_of(type(callback), _OF_LIGHTNING) and not is_a(callback, "callbacks", "ProgressBar"):
            yield f"callback {index} ({type(callback).__name__})", (callback, ())
    if trainer.datamodule is not None:
        of_every_datamodule = frozenset(vars(lightning.LightningDataModule())) | {"_hparams", "_hparams_initial"}
        yield type(trainer.datamodule).__name__, (trainer.datamodule, of_every_datamodule)


def _held_by(roots: dict[str, tuple[Any, Collection[str]]], known: Collection[int]) -> Iterator[tuple[str, Any]]:
    seen = {*known, *(id(root) for root, _ in roots.values())}
    for path, (root, leave) in roots.items():
        for name, value in vars(root).items():
            if name in leave or not _enters(value):
                continue
            for where, held in reach(value, f"{path}.{name}", enters=_enters):
                if id(held) not in seen:
                    seen.add(id(held))
                    yield where, held


def _enters(value: Any) -> bool:
    """Whether to look into a value: data has its own watch, and so have modules."""
    is_data = isinstance(value, Dataset | Sampler | DataLoader)
    return not is_data and not isinstance(value, nn.Module) and not _is_of(type(value), (*_CLIENTS, *_OF_LIGHTNING))
