"""The batches of one rank, by step."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import DistributedSampler, TensorDataset

from benchmarks.gpt import random_tokens


class Batches:
    """A rank's share of the samples, reshuffled in each epoch, with access to the batch of any step.

    Args:
        samples: number of samples.
        batch: samples per rank and step.
        rank: rank of this share.
        ranks: number of ranks.
    """

    def __init__(self, samples: int, batch: int, rank: int, ranks: int) -> None:
        self._tokens = random_tokens(samples)
        self._batch = batch
        self._sampler: DistributedSampler[Any] = DistributedSampler(
            TensorDataset(self._tokens), num_replicas=ranks, rank=rank, shuffle=True, drop_last=True
        )
        self._epoch, self._order = -1, list[int]()

    def at(self, step: int) -> Tensor:
        """Return the tokens, of shape [batch, CONTEXT + 1], for the step after `step` finished steps."""
        epoch, place = divmod(step, len(self._sampler) // self._batch)
        if epoch != self._epoch:
            self._sampler.set_epoch(epoch)
            self._epoch, self._order = epoch, [*self._sampler]
        return self._tokens[self._order[place * self._batch : (place + 1) * self._batch]]
