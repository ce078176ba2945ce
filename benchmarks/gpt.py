"""The model that is trained: a small decoder-only transformer, in sizes that differ only in width.

All sizes have the same number of tensors, so that a linear fit over the sizes separates the cost per byte of a mirrored
step from its fixed cost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the conventional name

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
        """Map `x` of shape [batch, time, width] to a tensor of the same shape."""
        batch, time, width = x.shape
        parts = self.project_in(self.before_attention(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project_out(seen.transpose(1, 2).reshape(batch, time, width))
        fed: Tensor = self.feed(self.before_feed(x))
        return x + fed


class GPT(nn.Module):
    """Next-token prediction.

    Args:
        size: key of `WIDTHS`.
    """

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

    def parameter_count(self) -> int:
        """Return the number of parameters."""
        return sum(p.numel() for p in self.parameters())


def random_tokens(samples: int) -> Tensor:
    """Return tokens of shape [samples, CONTEXT + 1], the same at every call."""
    return torch.randint(VOCABULARY, (samples, CONTEXT + 1), generator=torch.Generator().manual_seed(5))
