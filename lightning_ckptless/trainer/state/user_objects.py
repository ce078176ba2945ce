"""Objects that the module, callbacks and datamodule hold: a queue, a tracker, a schedule written by the user.

Plain attributes of objects whose class is user code are restored with a version. Objects of installed packages are not
touched: they may be clients, connections or caches that manage their own state. If one of those changes, or any object
is replaced by another, a replacement process does not have that change, and a warning names it once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from operator import is_, methodcaller
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_ckptless.internals.lightning.distribution import distribution_of, is_a, is_part_of_a_run, module
from lightning_ckptless.internals.torch_internals import child_dict, hooks_of
from lightning_ckptless.trainer.state.changes import NAMED_ONLY, OBJECTS_LEFT_ALONE, Changes
from lightning_ckptless.trainer.state.held_states import HeldStates
from lightning_ckptless.trainer.state.object_attributes import attributes_of
from lightning_ckptless.trainer.state.own_state import is_observer
from lightning_ckptless.trainer.state.plain_values import is_plain
from lightning_ckptless.trainer.state.program_variables import is_users_module, variables_of
from lightning_ckptless.trainer.state.reachability import has_attributes, home_of, is_of_standard_library, reach
from lightning_ckptless.trainer.state.rng import generators_of
from lightning_ckptless.trainer.state.tensors import callback_modules
from lightning_ckptless.trainer.state.unreadable import is_unreadable

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_VALUES = methodcaller("values")
_FUNCTIONS = (type, FunctionType, MethodType)
_NO_STATE = (nn.Module, torch.Tensor, torch.Generator, torch.optim.Optimizer, ModuleType)
"""Captured elsewhere, or not changed by training."""
_OF_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_ckptless")
_CLIENTS = ("wandb", "mlflow", "comet_ml", "neptune", "aim", "tensorboard", "tensorboardX", "tqdm", "rich")


class _Found:
    """The objects to be watched now.

    Args:
        trainer: in `fit`.
        known: identities of objects that are watched elsewhere.

    Attributes:
        roots: the objects that hooks are called on, by path, with names of attributes to ignore.
        variables: the same of the classes and modules of the script.
        own: objects that the script determines, by path.
        installed: objects of installed packages.
    """

    def __init__(self, trainer: Any, known: Collection[int]) -> None:
        self.roots = dict(_roots(trainer))
        held = list(_held_by(self.roots, known))
        owners = [*(root for root, _ in self.roots.values()), *(it for _, it in held)]
        self.variables = dict(variables_of(owners))
        held += [(path, root) for path, (root, _) in self.variables.items()]
        held += _held_by(self.variables, {*known, *map(id, owners), *(id(it) for _, it in held)})
        held += _held_by_hooks(trainer.lightning_module, {id(it) for _, it in held})
        self.own = {path: it for path, it in held if path in self.variables or _is_of_script(it)}
        self.installed = {path: it for path, it in held if path not in self.own}

    def watch_own(self, earlier: Changes | None = None) -> Changes:
        """Return what watches the objects that the script determines."""
        leave = {path: names for path, (_, names) in self.variables.items()}
        return Changes(self.own.items(), leave, policy=OBJECTS_LEFT_ALONE, earlier=earlier)


def watch_before_start(trainer: Any) -> Changes:
    """Watch the objects that are there before the hooks of a starting fit, some of which a new process does not run."""
    return _Found(trainer, ()).watch_own()


class UserObjects:
    """Watches the user's objects from the end of the `on_train_start` hooks.

    Args:
        trainer: in `fit`.
        known: identities of objects that are watched elsewhere.
        earlier: what watches the objects that were there before these hooks.
    """

    def __init__(self, trainer: Any, known: Collection[int], earlier: Changes | None = None) -> None:
        found = _Found(trainer, known)
        roots, every = found.roots, found.roots | found.variables
        self._own = found.watch_own(earlier)
        self._installed = Changes(found.installed.items(), policy=NAMED_ONLY)
        attributes = {path: _searched(root, names) for path, (root, names) in every.items()}
        generators = {id(generator) for root, _ in roots.values() for generator in generators_of(root).values()}
        self._held = HeldStates(attributes, {*_captured_elsewhere(trainer), *generators}, _is_own_object)
        self._children = _Children(trainer.lightning_module)
        self._references = _References(roots)

    @property
    def changes(self) -> tuple[Changes, ...]:
        """What tracks the attributes of the objects."""
        return self._own, self._installed

    def capture(self) -> dict[str, Any]:
        """Return what has changed in objects whose class is user code, and the states of those of torch."""
        self._installed.capture()
        return {"own": self._own.capture(), "held": self._held.capture()}

    def apply(self, saved: dict[str, Any]) -> None:
        """Restore what `capture` returned."""
        self._own.apply(saved["own"])
        self._held.apply(saved["held"])

    def unreadable(self) -> list[str]:
        """Return the objects whose state cannot be read."""
        return self._held.unreadable

    def lost(self) -> list[str]:
        """Return the attributes whose change since the last call would be lost with the process, each once."""
        exchanged = self._references.exchanged()
        return [*self._own.lost(), *self._installed.lost(), *self._held.lost(), *self._children.added(), *exchanged]


class _Children:
    """Tracks the modules of a model: a new process has those that the script creates, and not those added since."""

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        self._dicts = {path: child_dict(module) for path, module in model.named_modules()}
        self._counts = self._count()
        self._known = self._paths()

    def added(self) -> Iterator[str]:
        """Yield the paths of modules that were added since the last call."""
        if (counts := self._count()) == self._counts:
            return
        self._counts, known, self._known = counts, self._known, self._paths()
        yield from (f"{self._name}.{path}" for path in self._known if path not in known)

    def _count(self) -> list[int]:
        return list(map(len, self._dicts.values()))

    def _paths(self) -> list[str]:
        return [f"{path}.{name}" if path else name for path, children in self._dicts.items() for name in children]


class _References:
    """Tracks which objects the attributes of modules, callbacks and the datamodule refer to, plain values excluded."""

    def __init__(self, roots: dict[str, tuple[Any, Collection[str]]]) -> None:
        self._attributes = {path: vars(root) for path, (root, _) in roots.items()}
        self._leave = {path: set(leave) for path, (_, leave) in roots.items()}
        self._classes = {path: type(root) for path, (root, _) in roots.items()}
        # Exclude tensors: a reference here would keep replaced ones in memory.
        self._first = {
            path: {name: value for name, value in attributes.items() if _is_reference(value)}
            for path, attributes in self._attributes.items()
        }
        self._values = self._now()

    def exchanged(self) -> list[str]:
        """Return the paths of attributes that no longer refer to their original object, each once."""
        before, self._values = self._values, self._now()
        if len(before) == len(self._values) and all(map(is_, before, self._values)):
            return []
        return [f"{path}.{name}" for path in self._attributes for name in self._exchanged(path)]

    def _exchanged(self, path: str) -> Iterator[str]:
        first, leave = self._first[path], self._leave[path]
        for name, value in list(self._attributes[path].items()):
            is_other = first.get(name) is not value and name not in leave and _is_reference(value)
            if is_other and not self._is_the_same_method(path, name, value):
                leave.add(name)
                yield name

    def _now(self) -> list[Any]:
        return list(chain.from_iterable(map(_VALUES, self._attributes.values())))

    def _is_the_same_method(self, path: str, name: str, value: Any) -> bool:
        # Lightning sets `forward` for the time of a step, and then sets it to what it was.
        is_of_class = isinstance(value, MethodType) and value.__func__ is getattr(self._classes[path], name, None)
        return is_of_class or (isinstance(value, MethodType) and value == self._first[path].get(name))


def _is_reference(value: Any) -> bool:
    if isinstance(value, _FUNCTIONS):
        return True
    cls: Any = type(value)
    is_object = bool(cls.__dictoffset__ or has_attributes(value)) and not isinstance(value, _NO_STATE)
    # In this order: a new process has not seen the classes yet, and asks each of their bases.
    is_of_user = is_object and not _is_of(cls, (*_CLIENTS, *_OF_LIGHTNING)) and not is_plain(value)
    return (is_of_user and not is_part_of_a_run(value)) or is_unreadable(value)


def _is_of(cls: type, packages: Collection[str]) -> bool:
    return cls.__module__.partition(".")[0] in packages


def _roots(trainer: Any) -> Iterator[tuple[str, tuple[Any, Collection[str]]]]:
    """Yield the objects that hooks are called on, by path, with the attribute names of Lightning and torch."""
    lightning = module(distribution_of(trainer))
    model = trainer.lightning_module
    of_every_model = frozenset(vars(lightning.LightningModule())) | {"_hparams", "_hparams_initial"}
    for path, submodule in model.named_modules():
        if submodule is model or not _is_of(type(submodule), ("torch", "torchmetrics")):
            where = f"{type(model).__name__}.{path}" if path else type(model).__name__
            yield where, (submodule, of_every_model if submodule is model else _OF_EVERY_MODULE)
    for index, callback in enumerate(trainer.callbacks):
        is_own = not _is_of(type(callback), _OF_LIGHTNING) or is_a(callback, "callbacks", "LambdaCallback")
        if is_own and not is_a(callback, "callbacks", "ProgressBar") and not is_observer(callback):
            yield f"callback {index} ({type(callback).__name__})", (callback, ())
    if trainer.datamodule is not None:
        of_every_datamodule = frozenset(vars(lightning.LightningDataModule())) | {"_hparams", "_hparams_initial"}
        yield type(trainer.datamodule).__name__, (trainer.datamodule, of_every_datamodule)


def _held_by(roots: dict[str, tuple[Any, Collection[str]]], known: Collection[int]) -> Iterator[tuple[str, Any]]:
    seen = {*known, *(id(root) for root, _ in roots.values())}
    for path, (root, leave) in roots.items():
        for name, value in attributes_of(root).items():
            if name in leave or not _enters(value):
                continue
            for where, held in reach(value, f"{path}.{name}", enters=_enters):
                if id(held) not in seen:
                    seen.add(id(held))
                    yield where, held


def _held_by_hooks(model: nn.Module, known: Collection[int]) -> Iterator[tuple[str, Any]]:
    """Yield the functions of the script that are hooks of a module and keep something, and what they hold."""
    for path, submodule in model.named_modules():
        for index, hook in enumerate(hooks_of(submodule)):
            if _is_of_script(hook) and _enters(hook):
                where = f"hook {index} of {path or type(model).__name__}"
                yield from (found for found in reach(hook, where, enters=_enters) if id(found[1]) not in known)


def _searched(root: Any, leave: Collection[str]) -> dict[str, Any]:
    """Return the attributes in which objects of torch may be held beside the model."""
    return {name: value for name, value in attributes_of(root).items() if name not in leave}


def _captured_elsewhere(trainer: Any) -> Iterator[int]:
    held = (module for _, module in callback_modules(trainer))
    yield from (id(module) for root in (trainer.lightning_module, *held) for module in root.modules())
    yield from map(id, trainer.optimizers)
    yield from (id(config.scheduler) for config in trainer.lr_scheduler_configs)


def _is_own_object(value: Any) -> bool:
    return _is_of_script(value) and has_attributes(value) and _enters(value)


def _is_of_script(value: Any) -> bool:
    """Return whether the script determines what an object consists of."""
    return is_of_standard_library(value) or is_users_module(home_of(value))


def _enters(value: Any) -> bool:
    """Return whether to search a value: data and modules are watched elsewhere."""
    if isinstance(value, FunctionType):
        return is_users_module(home_of(value))
    is_data = isinstance(value, Dataset | Sampler | DataLoader) or is_unreadable(value)
    return not is_data and not isinstance(value, nn.Module) and not _is_of(type(value), (*_CLIENTS, *_OF_LIGHTNING))
