"""Sharded models: keeps every parameter in its sharded form when state is read or written.

A module under `fully_shard` replaces its sharded parameters with unsharded ones while it computes, and the root module
leaves them in place after validation. The sharded parameters are the state that is mirrored and restored.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn


def sharded_modules(model: nn.Module) -> tuple[Any, ...]:
    """Return the modules of a model that are under `fully_shard`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        # If it was never imported it is not in use, and importing it is slow.
        return ()
    return tuple(module for module in model.modules() if isinstance(module, fsdp.FSDPModule))


def reshard(modules: Sequence[Any]) -> None:
    """Put the sharded parameters back in place of unsharded ones; no communication.

    Args:
        modules: the result of `sharded_modules`.
    """
    for module in modules:
        module.reshard()
