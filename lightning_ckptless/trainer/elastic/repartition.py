"""A training dataloader that runs what is left of an epoch, dealt to another number of ranks (`protocol.dealing`)."""

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
    """The micro-batches of one rank's hand, as lists of indices.

    Args:
        whole: the batch sampler of any stream of the epoch.
        repartition: how the rest is dealt.
        rank: whose hand.
    """

    def __init__(self, whole: BatchSampler, repartition: Repartition, rank: int) -> None:
        self.sampler = whole.sampler
        self._whole = whole
        self._repartition = repartition
        self._rank = rank

    def __len__(self) -> int:
        return self._repartition.steps

    def __iter__(self) -> Iterator[list[int]]:
        of_stream = [list(self._stream(stream)) for stream in range(self._repartition.streams)]
        for stream, position in self._repartition.hand(self._rank):
            yield of_stream[stream][position]

    def _stream(self, stream: int) -> BatchSampler:
        sampler: Any = copy.copy(self.sampler)
        sampler.rank = stream
        return BatchSampler(sampler, self._whole.batch_size, self._whole.drop_last)


def deal_out(loader: Any, repartition: Repartition, rank: int) -> None:
    """Have a dataloader run a rank's hand, from its next iterator on.

    Args:
        loader: set up for a stream of the epoch, or dealt already.
        repartition: how the rest is dealt.
        rank: whose hand.

    Raises:
        OptionsError: its share of the samples is not Lightning's to say.
    """
    batches: Any = loader.batch_sampler if isinstance(loader, DataLoader) else None
    whole = batches._whole if isinstance(batches, RepartitionedBatches) else batches
    sampler: Any = getattr(whole, "sampler", None)
    ours = isinstance(whole, BatchSampler) and hasattr(sampler, "num_replicas") and sampler_inside(sampler) is None
    if not ours or not torch_internals.is_map_style(loader):
        raise OptionsError(
            f"the rest of the epoch cannot be dealt to {repartition.world_size} ranks: the samples of a "
            f"{type(loader).__name__} are not divided by Lightning's DistributedSampler. With elastic_batch='scale' "
            "leave the sampler to Lightning (a dataset that is read by index, shuffle=True or False), or take "
            "elastic_batch='keep'"
        )
    # A loader refuses another batch sampler once it is made; nothing of it depends on the one before.
    object.__setattr__(loader, "batch_sampler", RepartitionedBatches(whole, repartition, rank))
