"""A training dataloader for the rest of an epoch, repartitioned over a new number of ranks (`protocol.repartition`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Sampler

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals import torch_internals
from lightning_ckptless.internals.lightning.samplers import sampler_inside
from lightning_ckptless.protocol.repartition import Repartition


class RepartitionedBatches(Sampler[list[int]]):
    """Yields the micro-batches assigned to one rank, as lists of indices.

    Args:
        whole: the batch sampler of any virtual rank of the epoch.
        repartition: how the rest of the epoch is divided.
        rank: the rank.
    """

    def __init__(self, whole: BatchSampler, repartition: Repartition, rank: int) -> None:
        self.sampler = whole.sampler
        self._whole = whole
        self._repartition = repartition
        self._rank = rank

    def __len__(self) -> int:
        return self._repartition.steps

    def __iter__(self) -> Iterator[list[int]]:
        batches = [list(self._batches_of(number)) for number in range(self._repartition.virtual_ranks)]
        for virtual_rank, position in self._repartition.batches_of(self._rank):
            yield batches[virtual_rank][position]

    def _batches_of(self, virtual_rank: int) -> BatchSampler:
        sampler: Any = copy.copy(self.sampler)
        sampler.rank = virtual_rank
        return BatchSampler(sampler, self._whole.batch_size, self._whole.drop_last)


def repartition_loader(loader: Any, repartition: Repartition, rank: int) -> None:
    """Make a dataloader return the micro-batches assigned to a rank, from its next iterator on.

    Args:
        loader: set up for a virtual rank of the epoch, or repartitioned already.
        repartition: how the rest of the epoch is divided.
        rank: the rank.

    Raises:
        OptionsError: its samples are not divided by Lightning's sampler.
    """
    batches: Any = loader.batch_sampler if isinstance(loader, DataLoader) else None
    whole = batches._whole if isinstance(batches, RepartitionedBatches) else batches
    sampler: Any = getattr(whole, "sampler", None)
    ours = isinstance(whole, BatchSampler) and hasattr(sampler, "num_replicas") and sampler_inside(sampler) is None
    if not ours or not torch_internals.is_map_style(loader):
        raise OptionsError(
            f"the rest of the epoch cannot be repartitioned to {repartition.world_size} ranks: the samples of a "
            f"{type(loader).__name__} are not divided by Lightning's DistributedSampler. With elastic_batch='scale', "
            "let Lightning add the sampler (map-style dataset, shuffle=True or False), or set elastic_batch='keep'"
        )
    # A DataLoader refuses assignment of its batch sampler, but nothing in it depends on the previous one.
    object.__setattr__(loader, "batch_sampler", RepartitionedBatches(whole, repartition, rank))
