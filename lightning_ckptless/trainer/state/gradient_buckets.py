"""The buckets in which gradients are summed over the ranks: part of what makes a step exact.

Data parallelism begins with one division of the parameters into buckets and changes to another one in its second
step. Sums of three ranks or more round by the place of a gradient in its bucket, so a process that comes later has to
begin with the buckets that the others had come to.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from lightning_ckptless.internals.torch_internals import bucket_layout, set_bucket_layout, settle_buckets

Buckets = list[list[int]] | None
"""Places of the parameters by bucket; None where a model has none."""


_SUMMED: weakref.WeakKeyDictionary[DistributedDataParallel, frozenset[int]] = weakref.WeakKeyDictionary()


def note_summed(model: Any) -> None:
    """Remember which parameters want gradients as a model is wrapped: those of the others are never summed."""
    if isinstance(model, DistributedDataParallel):
        _SUMMED[model] = frozenset(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def summed_parameters(model: Any) -> frozenset[int] | None:
    """Identities of the parameters whose gradients are summed over the ranks; None where that is not DDP's to say."""
    if not isinstance(model, DistributedDataParallel):
        return None
    if model not in _SUMMED:
        parameters = list(model.module.parameters())
        _SUMMED[model] = frozenset(id(parameters[place]) for bucket in bucket_layout(model) for place in bucket)
    return _SUMMED[model]


class BucketWatch:
    """The buckets of one model, looked up again only when they have changed."""

    def __init__(self) -> None:
        self._seen: tuple[object, bool] | None = None
        self._layout: Buckets = None

    def settled(self, model: Any) -> Buckets:
        """The buckets of the next step. All ranks ask together: the first one decides for all.

        Args:
            model: as the strategy trains it.
        """
        if not isinstance(model, DistributedDataParallel):
            return None
        seen = model.reducer, settle_buckets(model)
        if seen != self._seen:
            self._seen, self._layout = seen, bucket_layout(model)
        return self._layout


def restore_buckets(model: Any, saved: Buckets) -> None:
    """Have the next step use saved buckets.

    Args:
        model: as the strategy trains it.
        saved: what `settled` returned; None changes nothing.
    """
    if saved is not None and isinstance(model, DistributedDataParallel) and bucket_layout(model) != saved:
        set_bucket_layout(model, saved)
        # The run may have wrapped its model once more, with other parameters thawed.
        _SUMMED.pop(model, None)
