"""Sharded models as the state sees them: every parameter in the part that this rank keeps.

A module under `fully_shard` puts its whole parameters in place of the sharded ones while it computes, and the outermost
one leaves them there after a validation. What is mirrored and restored are the sharded ones: they are the state.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn


def sharded_modules(model: nn.Module) -> tuple[Any, ...]:
    """The modules of a model that shard their parameters by themselves."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        # Who has not imported it has not used it, and importing it takes long.
        return ()
    return tuple(module for module in model.modules() if isinstance(module, fsdp.FSDPModule))


def reshard(modules: Sequence[Any]) -> None:
    """Put the sharded parameters in place, wherever whole ones are; no communication.

    Args:
        modules: as `sharded_modules` gives them.
    """
    for module in modules:
        module.reshard()
