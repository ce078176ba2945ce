"""The buckets in which gradients are summed over the ranks: part of what makes a step exact.

Data parallelism begins with one division of the parameters into buckets and changes to another one in its second
step. Sums of three ranks or more round by the place of a gradient in its bucket, so a process that comes later has to
begin with the buckets that the others had come to.
"""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from lightning_ckptless.torch_internals import bucket_layout, set_bucket_layout, settle_buckets

Buckets = list[list[int]] | None
"""Places of the parameters by bucket; None where a model has none."""


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
