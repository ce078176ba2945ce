"""Whether this node is fit to train: looked at before a worker joins the others, at the start and after every fault."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import psutil
import torch

from lightning_ckptless.errors import OptionsError, UnfitNodeError

LEAST_MEMORY_BYTES = 256 * 2**20
_SIZE = 64


def check_health(device: torch.device, own_check: str, node: str) -> None:
    """Compute something small on the device, look at the memory, and ask the user's own check.

    Args:
        device: that this rank trains on.
        own_check: dotted name of a function of the user's that raises where the node is not fit; empty for none.
        node: name of this node, for the message.

    Raises:
        UnfitNodeError: the node is not to be trained on; the message says why.
        OptionsError: there is no such function.
    """
    for finding in _findings(device, own_check):
        raise UnfitNodeError(f"node {node} is not fit to train: {finding}. It stays out; start an agent on another one")


def _findings(device: torch.device, own_check: str) -> Iterator[str]:
    try:
        product = torch.ones(_SIZE, _SIZE, device=device) @ torch.ones(_SIZE, _SIZE, device=device)
        wrong = int((product != _SIZE).sum())
    except (RuntimeError, AssertionError) as error:
        yield f"{device} cannot multiply two matrices: {error}"
        return
    if wrong:
        yield f"{device} got {wrong} of {_SIZE * _SIZE} numbers of a product wrong"
    available_bytes = psutil.virtual_memory().available
    if available_bytes < LEAST_MEMORY_BYTES:
        yield f"{available_bytes / 2**20:.0f} MiB of memory are available, {LEAST_MEMORY_BYTES // 2**20} are the least"
    if own_check:
        try:
            _function(own_check)()
        except OptionsError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the user's check raises is its answer
            yield f"{own_check} says {type(error).__name__}: {error}"


def _function(name: str) -> Any:
    module_name, _, function_name = name.rpartition(".")
    try:
        return getattr(import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionsError(f"health_check={name!r}: expected the dotted name of a function: {error}") from error
