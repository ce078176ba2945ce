"""The cells of `sharded` (model size, ranks, DDP or FSDP2), and which of them fit into the machine's memory."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpt import LAYERS

FLOAT_BYTES = 4
STATE_FLOATS = 3
"""Floats per parameter in the state: itself, and AdamW's two moments."""


@dataclass(frozen=True)
class Cell:
    """A model on a number of ranks.

    Args:
        size: model size, a key of `gpt.WIDTHS`.
        parameters: number of parameters.
        ranks: number of ranks.
        is_sharded: True for FSDP2, False for DDP.
    """

    size: str
    parameters: int
    ranks: int
    is_sharded: bool

    @property
    def strategy(self) -> str:
        """Name in the tables."""
        return "FSDP2" if self.is_sharded else "DDP"

    @property
    def state_bytes(self) -> int:
        """Bytes of the mirrored tensor state."""
        return STATE_FLOATS * FLOAT_BYTES * self.parameters

    def training_bytes(self) -> int:
        """Return the bytes that training takes without mirroring: state, gradients, and buffers of DDP or FSDP2."""
        whole = FLOAT_BYTES * self.parameters
        if self.is_sharded:
            # In addition to the shards, each rank has the gathered weights and gradients of two blocks.
            return (STATE_FLOATS + 1) * whole + self.ranks * 4 * whole // LAYERS
        return self.ranks * (STATE_FLOATS + 2) * whole

    def arena_bytes(self, kept: int) -> int:
        """Return the peak bytes of all arenas: two slots per copy, plus those of the first step."""
        return 2 * (1 + kept) * self.state_bytes * 4 // 3


@dataclass(frozen=True)
class Fit:
    """The number of kept shards with which a cell fits.

    Args:
        kept: shards that a rank keeps for others; None if the cell does not fit at all.
        reason: the calculation, in words.
    """

    kept: int | None
    reason: str


def fit(cell: Cell, free_bytes: int) -> Fit:
    """Choose the number of kept shards, one or zero, with which a cell fits into memory.

    Args:
        cell: the cell.
        free_bytes: free memory.
    """

    def needed(kept: int) -> int:
        return cell.training_bytes() + cell.arena_bytes(kept)

    kept = 1 if needed(1) <= free_bytes else 0
    reason = (
        f"{cell.size}, {cell.strategy}, {cell.ranks} ranks: {cell.training_bytes() / 1e9:.1f} GB of training and "
        f"{cell.arena_bytes(kept) / 1e9:.1f} GB of arenas with {kept} kept shards, {free_bytes / 1e9:.1f} GB free"
    )
    return Fit(kept if needed(kept) <= free_bytes else None, reason)
