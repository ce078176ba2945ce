"""Checks that torch and one distribution of Lightning can be used, before anything is built on them."""

from __future__ import annotations

from functools import cache

from lightning_ckptless.internals import torch_names
from lightning_ckptless.internals.lightning import names
from lightning_ckptless.supported import check


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
    names.require(distribution)
