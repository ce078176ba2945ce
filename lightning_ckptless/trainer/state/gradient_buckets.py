"""DDP's gradient buckets, which are part of what makes a step bit-identical.

DDP starts with one division of the parameters into buckets and changes to another in its second step. With three or
more ranks, rounding in an all-reduce depends on a gradient's position in its bucket, so a replacement has to start with
the buckets that the other ranks use.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from lightning_ckptless.internals.torch_internals import (
    bucket_layout,
    has_sparse_gradients,
    set_bucket_layout,
    settle_buckets,
)

Buckets = list[list[int]] | None
"""Parameter indices by bucket; None for a model without buckets."""


_SUMMED: weakref.WeakKeyDictionary[DistributedDataParallel, frozenset[int]] = weakref.WeakKeyDictionary()


def note_summed(model: Any) -> None:
    """Remember which parameters require gradients when DDP wraps a model: it never reduces the others."""
    if isinstance(model, DistributedDataParallel):
        _SUMMED[model] = frozenset(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def summed_parameters(model: Any) -> frozenset[int] | None:
    """Return the identities of parameters whose gradients DDP reduces over the ranks; None without DDP."""
    if not isinstance(model, DistributedDataParallel):
        return None
    if model not in _SUMMED:
        parameters = list(model.module.parameters())
        _SUMMED[model] = frozenset(id(parameters[index]) for bucket in bucket_layout(model) for index in bucket)
    return _SUMMED[model]


class BucketWatch:
    """Caches the buckets of one model until they change."""

    def __init__(self) -> None:
        self._seen: tuple[object, bool] | None = None
        self._layout: Buckets = None

    def settled(self, model: Any) -> Buckets:
        """Return the buckets of the next step. Collective: rank 0 decides for all.

        Args:
            model: as the strategy trains it.
        """
        if not isinstance(model, DistributedDataParallel):
            return None
        seen = model.reducer, settle_buckets(model)
        if seen != self._seen:
            # torch lists no buckets if one is sparse. Every process then makes its own, alike for two ranks.
            self._seen, self._layout = seen, None if has_sparse_gradients(model) else bucket_layout(model)
        return self._layout


def restore_buckets(model: Any, saved: Buckets) -> None:
    """Make the next step use saved buckets.

    Args:
        model: as the strategy trains it.
        saved: the result of `settled`; None changes nothing.
    """
    if saved is not None and isinstance(model, DistributedDataParallel) and bucket_layout(model) != saved:
        set_bucket_layout(model, saved)
        # The run may have wrapped its model again with a different set of trainable parameters.
        _SUMMED.pop(model, None)
