"""Fault-tolerant training for PyTorch Lightning.

Importing this package makes `Trainer(strategy="ckptless")` known to Lightning, whichever of the two is imported first.
It imports neither torch nor Lightning: public names are loaded when they are asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_ckptless._registration.autoload import autoload

if TYPE_CHECKING:
    from lightning_ckptless.errors import (
        ArenaError,
        CkptlessError,
        LaunchError,
        LayoutMismatchError,
        OptionsError,
        ProtocolError,
        StateMissingError,
        TimeLimitError,
        TransportError,
        UnfitNodeError,
        VersionError,
        WorldSizeError,
    )
    from lightning_ckptless.metrics import Goodput, RecoveryTime
    from lightning_ckptless.options import CkptlessOptions
    from lightning_ckptless.supported import UntestedVersionWarning

    CkptlessModelParallelStrategy: Any
    CkptlessStrategy: Any
    FaultInjector: Any
    __version__: str

__all__ = [
    "ArenaError",
    "CkptlessError",
    "CkptlessModelParallelStrategy",
    "CkptlessOptions",
    "CkptlessStrategy",
    "FaultInjector",
    "Goodput",
    "LaunchError",
    "LayoutMismatchError",
    "OptionsError",
    "ProtocolError",
    "RecoveryTime",
    "StateMissingError",
    "TimeLimitError",
    "TransportError",
    "UnfitNodeError",
    "UntestedVersionWarning",
    "VersionError",
    "WorldSizeError",
]

_STRATEGIES = {"CkptlessStrategy": "ckptless", "CkptlessModelParallelStrategy": "ckptless_model_parallel"}
_HOMES = {
    "CkptlessOptions": "options",
    "Goodput": "metrics",
    "RecoveryTime": "metrics",
    "UntestedVersionWarning": "supported",
}


def __getattr__(name: str) -> Any:
    """Load a public name.

    The strategies and `FaultInjector` are classes of the Lightning that is imported: of `lightning.pytorch`, or of
    `pytorch_lightning` where only that is.
    """
    if name in _STRATEGIES:
        from lightning_ckptless._registration.assembly import strategy_for

        return strategy_for(_distribution(), _STRATEGIES[name])
    if name == "FaultInjector":
        from lightning_ckptless.testing.fault_injector import fault_injector_class

        return fault_injector_class(_distribution())
    if name == "__version__":
        from importlib.metadata import version

        return version("lightning-ckptless")
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _distribution() -> str:
    only_the_other = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    return "pytorch_lightning" if only_the_other else "lightning.pytorch"


if "torch" not in sys.modules:
    # Otherwise torch may be importing this package, and would fail with it: then a strategy is refused when it is made.
    from lightning_ckptless.supported import check

    check()
autoload()
