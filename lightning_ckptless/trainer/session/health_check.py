"""Health checks of a node: before a worker joins the others, at the start and after every fault, and during training.

The check during training is repeated by a sidecar: see `health_watch.py`.
"""

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
    """Run a small computation on the device, check available memory, and call the user's own check.

    Args:
        device: device that this rank trains on.
        own_check: dotted name of a user function that raises if the node is unfit; empty for none.
        node: name of this node, for the message.

    Raises:
        UnfitNodeError: the node failed a check.
        OptionsError: `own_check` does not name a function.
    """
    if finding := find_unfit(device, own_check):
        raise UnfitNodeError(f"node {node} failed its health check: {finding}. Start an agent on another node")


def find_unfit(device: torch.device, own_check: str) -> str:
    """Return the first problem of this node; empty if there is none.

    Args:
        device: device that is checked.
        own_check: dotted name of a user function that raises if the node is unfit; empty for none.

    Raises:
        OptionsError: `own_check` does not name a function.
    """
    return next(_findings(device, own_check), "")


def _findings(device: torch.device, own_check: str) -> Iterator[str]:
    try:
        product = torch.ones(_SIZE, _SIZE, device=device) @ torch.ones(_SIZE, _SIZE, device=device)
        wrong = int((product != _SIZE).sum())
    except (RuntimeError, AssertionError) as error:
        yield f"{device} failed to multiply two matrices: {error}"
        return
    if wrong:
        yield f"{device} computed {wrong} of {_SIZE * _SIZE} elements of a matrix product wrong"
    available_bytes = psutil.virtual_memory().available
    if available_bytes < LEAST_MEMORY_BYTES:
        least = LEAST_MEMORY_BYTES // 2**20
        yield f"{available_bytes / 2**20:.0f} MiB of memory are available, at least {least} MiB are required"
    if own_check:
        try:
            _function(own_check)()
        except OptionsError:
            raise
        except Exception as error:  # noqa: BLE001 - any exception of the user's check means unfit
            yield f"{own_check} raised {type(error).__name__}: {error}"


def _function(name: str) -> Any:
    module_name, _, function_name = name.rpartition(".")
    try:
        return getattr(import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionsError(f"health_check={name!r}: expected the dotted name of a function: {error}") from error
