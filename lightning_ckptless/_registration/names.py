"""Registers the names of our strategies, such as `"ckptless"`, with Lightning, without importing Lightning or torch.

Lightning has a registry of strategies but no entry point for it. If a distribution of Lightning is already imported,
the names are registered at once. Otherwise a finder at the front of `sys.meta_path` registers them after the module
with the registry has been executed. The strategy and its dependencies are imported when a trainer requests it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

from lightning_ckptless._registration import mlflow_tables
from lightning_ckptless.distributions import CLASSES, DISTRIBUTIONS


class Registered(NamedTuple):
    """An entry of the registry.

    Args:
        strategy: class of the strategy.
        options: options implied by the name.
        description: description shown by the registry.
    """

    strategy: str
    options: dict[str, Any]
    description: str


_DATA_PARALLEL = "Data parallelism that survives the loss of any rank, bit for bit"
NAMES = {
    "ckptless": Registered("CkptlessStrategy", {}, _DATA_PARALLEL),
    # Scripts look for "ddp" in the name of a strategy, and for Lightning's names for options of DDP. The start methods
    # `ddp_notebook` and `ddp_fork` share one counterpart; `ddp_spawn` has none.
    "ckptless_ddp": Registered("CkptlessStrategy", {}, _DATA_PARALLEL),
    "ckptless_ddp_find_unused_parameters_true": Registered(
        "CkptlessStrategy", {"find_unused_parameters": True}, f"{_DATA_PARALLEL}; parameters may be unused in a step"
    ),
    "ckptless_ddp_find_unused_parameters_false": Registered(
        "CkptlessStrategy",
        {"find_unused_parameters": False},
        f"{_DATA_PARALLEL}; every parameter is used in every step",
    ),
    "ckptless_notebook": Registered(
        "CkptlessStrategy",
        {"start_method": "fork"},
        f"{_DATA_PARALLEL}; workers are forked from the notebook's process",
    ),
    "ckptless_model_parallel": Registered(
        "CkptlessModelParallelStrategy",
        {},
        "Sharded models (FSDP2, tensor parallel) that survive the loss of any rank, bit for bit",
    ),
}
_REGISTRIES = {f"{distribution}.strategies": distribution for distribution in DISTRIBUTIONS}


def register_everywhere(again: Callable[[], None]) -> None:
    """Register with all distributions of Lightning, imported now or later. Idempotent.

    Args:
        again: called after a distribution has been imported; must not raise.
    """
    mlflow_tables.serialize_opening()
    for module_name, distribution in _REGISTRIES.items():
        # A module that is still being executed may have no registry yet. Its loader calls this function again.
        registry = getattr(sys.modules.get(module_name), "StrategyRegistry", None)
        for name, (strategy, options, description) in NAMES.items():
            if registry is not None and name not in registry:
                build = partial(build_strategy, distribution, strategy, **options)
                registry.register(name, build, description=description)
    if not any(isinstance(finder, RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegistryFinder(again))


def build_strategy(distribution: str, strategy: str, **options: Any) -> Any:
    """Create a strategy for one distribution of Lightning.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.
        strategy: name of its class.
        **options: arguments of the class.
    """
    return getattr(classes_for(distribution), strategy)(**options)


def classes_for(distribution: str) -> ModuleType:
    """Import our module with the public classes for one distribution of Lightning.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.

    Raises:
        VersionError: Python, torch or Lightning is too old, or lacks a name that is used.
    """
    return import_module(CLASSES[distribution])


class RegistryFinder(MetaPathFinder):
    """Finds the modules with a registry and MLflow's store, and adds a call after their execution.

    Args:
        again: function to call after the execution.
    """

    def __init__(self, again: Callable[[], None]) -> None:
        self._again = again

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find one of these modules through the other finders; returns None for all other modules."""
        if fullname not in _REGISTRIES and fullname != mlflow_tables.STORE:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = RegisteringLoader(spec.loader, self._again)
                return spec
        return None


class RegisteringLoader(Loader):
    """Loads a module through its own loader, then registers the strategies and removes itself.

    Args:
        loader: the module's own loader.
        again: function that registers the strategies.
    """

    def __init__(self, loader: Loader, again: Callable[[], None]) -> None:
        self._loader, self._again = loader, again

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module with its own loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then register. A failed registration does not affect the module."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._again()
