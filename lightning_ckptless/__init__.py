"""Fault-tolerant training for PyTorch Lightning.

Importing this package registers `Trainer(strategy="ckptless")` with Lightning, whichever of the two is imported first.
It imports neither torch nor Lightning; public names are loaded on first access.
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
        RewindError,
        StateMissingError,
        TimeLimitError,
        TransportError,
        UnevenStepsError,
        UnfitNodeError,
        VersionError,
        WorkerError,
        WorldSizeError,
    )
    from lightning_ckptless.lightning_pytorch import (
        CkptlessModelParallelStrategy,
        CkptlessStrategy,
        FaultInjector,
        RewindOnNonFinite,
        RewindOnSpike,
    )
    from lightning_ckptless.metrics import Goodput, RecoveryTime
    from lightning_ckptless.options import CkptlessOptions
    from lightning_ckptless.supported import UntestedVersionWarning

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
    "RewindError",
    "RewindOnNonFinite",
    "RewindOnSpike",
    "StateMissingError",
    "TimeLimitError",
    "TransportError",
    "UnevenStepsError",
    "UnfitNodeError",
    "UntestedVersionWarning",
    "VersionError",
    "WorkerError",
    "WorldSizeError",
]

_PER_DISTRIBUTION = {
    "CkptlessModelParallelStrategy",
    "CkptlessStrategy",
    "FaultInjector",
    "RewindOnNonFinite",
    "RewindOnSpike",
}
_HOMES = {
    "CkptlessOptions": "options",
    "Goodput": "metrics",
    "RecoveryTime": "metrics",
    "UntestedVersionWarning": "supported",
}


def _load(name: str) -> Any:
    """Load a public name on first access.

    The strategies and callbacks subclass the Lightning distribution in use: `lightning.pytorch`, or
    `pytorch_lightning` if only that one has been imported.
    """
    if name in _PER_DISTRIBUTION:
        return getattr(import_module(_classes()), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("lightning-ckptless")
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:
    # Type checkers would accept any name.
    __getattr__ = _load


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _classes() -> str:
    """Name of the module with the classes for the distribution in use."""
    # Imported here, because `import torch` imports this module and must not fail because of another one.
    from lightning_ckptless.distributions import CLASSES, LIGHTNING, PYTORCH_LIGHTNING

    is_legacy = PYTORCH_LIGHTNING in sys.modules and LIGHTNING not in sys.modules
    return CLASSES[PYTORCH_LIGHTNING if is_legacy else LIGHTNING]


if "torch" not in sys.modules:
    # With torch in `sys.modules`, torch itself may be importing this package, and an error here would break
    # `import torch`. In that case the versions are checked when a strategy is created.
    from lightning_ckptless.supported import check

    check()
autoload()
