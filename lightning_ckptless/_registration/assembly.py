"""Assembles the strategy classes of a distribution with the parts that `trainer` must not import.

`trainer` does not depend on `testing` or `runner`; this top-level module connects them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from lightning_ckptless.internals import torch_names
from lightning_ckptless.supported import check


def strategy_for(distribution: str, name: str = "ckptless") -> type[Any]:
    """Return a strategy class for one distribution of Lightning.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.
        name: registered name of the strategy.

    Raises:
        VersionError: Python, torch or Lightning is too old, or lacks a name that is used.
    """
    require_libraries(distribution)
    from lightning_ckptless.runner import run_job
    from lightning_ckptless.trainer.strategy.strategies import strategy_class

    strategy = strategy_class(distribution, name)
    strategy.observers = staticmethod(lambda: callbacks_from_environment(distribution))
    strategy.run_job = staticmethod(run_job)
    strategy.blank = staticmethod(blank_strategy)
    return strategy


@cache
def require_libraries(distribution: str) -> None:
    """Refuse versions of torch and Lightning that are too old or lack names that are used.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.

    Raises:
        VersionError: a version is refused.
    """
    check(distribution)
    torch_names.require(torch_names.WORKER | torch_names.SHARDED)
    from lightning_ckptless.internals.lightning import names

    names.require(distribution)


def blank_strategy(distribution: str, name: str) -> Any:
    """Create an uninitialized strategy, for unpickling.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.
        name: registered name of the strategy.
    """
    cls: Any = strategy_for(distribution, name)
    return cls.__new__(cls)


def callbacks_from_environment(distribution: str) -> list[Any]:
    """Return the callbacks requested by environment variables: for traces and for fault injection."""
    from lightning_ckptless.testing.fault_injector import fault_injector_from_environment
    from lightning_ckptless.testing.trace import step_trace_from_environment

    # The trace comes first, so that a step is recorded before a fault is injected.
    callbacks = (step_trace_from_environment(distribution), fault_injector_from_environment(distribution))
    return [callback for callback in callbacks if callback is not None]
