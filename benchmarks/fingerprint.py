"""A fingerprint of a few bytes that differs between runs whose models or optimizers differ anywhere.

Every gradient depends on every parameter and on the ranks' batches, so after a step or two any difference has reached
every tensor. One tensor is enough, and adds almost nothing to a step.
"""

from __future__ import annotations

import zlib

import torch

from benchmarks.gpt import GPT


def fingerprint(model: GPT, optimizer: torch.optim.Optimizer) -> int:
    """Return the CRC-32 of the last norm's weights and of both of their AdamW moments."""
    weights = model.norm.weight
    moments = optimizer.state[weights]
    found = 0
    for tensor in (weights.detach(), moments["exp_avg"], moments["exp_avg_sq"]):
        found = zlib.crc32(tensor.numpy().tobytes(), found)
    return found
