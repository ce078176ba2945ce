"""The model of all jobs, a small decoder-only transformer in sizes that differ only in width, and its data.

All sizes have the same number of tensors, so that a linear fit over the sizes separates the cost per byte of a mirrored
step from its fixed cost.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the conventional name
from torch.utils.data import DistributedSampler, TensorDataset

VOCABULARY = 256
CONTEXT = 64
LAYERS = 5
WIDTHS = {
    "tiny": (16, 2),
    "1M": (128, 4),
    "10M": (400, 8),
    "33M": (736, 8),
    "100M": (1288, 8),
    "124M": (1440, 16),
    "300M": (2240, 16),
    "345M": (2400, 24),
}
"""Width and number of heads by name of the size."""


class Block(nn.Module):
    """Attention and a feed-forward network, each with a pre-norm and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.before_feed = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        parts = self.project_in(self.before_attention(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project_out(seen.transpose(1, 2).reshape(batch, time, width))
        fed: Tensor = self.feed(self.before_feed(x))
        return x + fed


class GPT(nn.Module):
    """Next-token prediction, in a size of `WIDTHS`."""

    def __init__(self, size: str) -> None:
        super().__init__()
        width, heads = WIDTHS[size]
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the loss of predicting each token of `tokens`, of shape [batch, CONTEXT + 1], from those before it."""
        seen, expected = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(seen) + self.places.weight[: seen.shape[1]]
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), expected.flatten())


def parameter_count(size: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(size).parameters())


def state_bytes(size: str) -> int:
    """Return the bytes of a model's parameters and of AdamW's two moments."""
    return 3 * 4 * parameter_count(size)


def fingerprint(model: GPT, optimizer: torch.optim.Optimizer) -> int:
    """Return a checksum that differs between runs whose models or optimizers differ anywhere.

    It is the CRC-32 of the last norm's weights and of both of their AdamW moments. Every gradient depends on every
    parameter and on the ranks' batches, so after a step or two any difference has reached every tensor. One tensor is
    enough, and adds almost nothing to a step.
    """
    weights = model.norm.weight
    moments = optimizer.state[weights]
    found = 0
    for tensor in (weights.detach(), moments["exp_avg"], moments["exp_avg_sq"]):
        found = zlib.crc32(tensor.numpy().tobytes(), found)
    return found


def random_tokens(samples: int) -> Tensor:
    """Return tokens of shape [samples, CONTEXT + 1], the same at every call."""
    return torch.randint(VOCABULARY, (samples, CONTEXT + 1), generator=torch.Generator().manual_seed(5))


class Batches:
    """A rank's share of the samples, reshuffled in each epoch, with access to the batch of any step."""

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
