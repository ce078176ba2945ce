"""Puts the rooms together: a strategy of one distribution, with the callbacks that the environment asks for.

`trainer` knows nothing of `callbacks`; what joins them is here, at the top.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from lightning_ckptless.internals import torch_names
from lightning_ckptless.supported import check


def strategy_for(distribution: str, name: str = "ckptless") -> type[Any]:
    """A strategy of one distribution.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.
        name: under which Lightning knows it.

    Raises:
        VersionError: Python, torch or Lightning is too old, or has moved what is used.
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
    """Refuse versions of torch and Lightning that are too old, or that have moved names which are used.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.

    Raises:
        VersionError: this one does.
    """
    check(distribution)
    torch_names.require(torch_names.WORKER | torch_names.SHARDED)
    from lightning_ckptless.internals.lightning import names

    names.require(distribution)


def blank_strategy(distribution: str, name: str) -> Any:
    """A strategy without attributes, for what reads a pickle of one.

    Args:
        distribution: of Lightning.
        name: under which Lightning knows it.
    """
    cls: Any = strategy_for(distribution, name)
    return cls.__new__(cls)


def callbacks_from_environment(distribution: str) -> list[Any]:
    """Callbacks that any script gets when the environment names faults to inject or a folder for traces."""
    from lightning_ckptless.testing.fault_injector import fault_injector_from_environment
    from lightning_ckptless.testing.trace import step_trace_from_environment

    # The trace first: what a step has come to is written down before a fault strikes.
    wanted = (step_trace_from_environment(distribution), fault_injector_from_environment(distribution))
    return [callback for callback in wanted if callback is not None]
