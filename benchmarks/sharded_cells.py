"""Which sizes, on how many ranks, sharded or not: and which of these cells fit into the machine's memory."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpt import LAYERS

FLOAT_BYTES = 4
STATE_FLOATS = 3
"""Of a parameter in the state: itself, and AdamW's two moments."""


@dataclass(frozen=True)
class Cell:
    """One model on some ranks.

    Args:
        size: of the model, one of `gpt.WIDTHS`.
        parameters: how many it has.
        ranks: how many train it.
        is_sharded: whether by FSDP2; else by data parallelism.
    """

    size: str
    parameters: int
    ranks: int
    is_sharded: bool

    @property
    def strategy(self) -> str:
        """As the tables call it."""
        return "FSDP2" if self.is_sharded else "DDP"

    @property
    def state_bytes(self) -> int:
        """Bytes of the state that is mirrored, the small one aside."""
        return STATE_FLOATS * FLOAT_BYTES * self.parameters

    def training_bytes(self) -> int:
        """Bytes that training takes without us: state, gradients, and what DDP or FSDP2 keep to send them."""
        whole = FLOAT_BYTES * self.parameters
        if self.is_sharded:
            # Gathered weights and gradients of two blocks on each rank, beside the sharded ones.
            return (STATE_FLOATS + 1) * whole + self.ranks * 4 * whole // LAYERS
        return self.ranks * (STATE_FLOATS + 2) * whole

    def arena_bytes(self, kept: int) -> int:
        """Bytes of all arenas at their peak: two slots of every copy, and those of the first step beside them."""
        return 2 * (1 + kept) * self.state_bytes * 4 // 3


@dataclass(frozen=True)
class Fit:
    """What a cell can be measured with.

    Args:
        kept: shards that a rank keeps for others; None where the cell does not fit at all.
        reason: the arithmetic.
    """

    kept: int | None
    reason: str


def fit(cell: Cell, free_bytes: int) -> Fit:
    """Choose the number of kept shards, one or none, with which a cell fits into memory.

    Args:
        cell: the cell.
        free_bytes: memory that is free.
    """

    def needed(kept: int) -> int:
        return cell.training_bytes() + cell.arena_bytes(kept)

    kept = 1 if needed(1) <= free_bytes else 0
    reason = (
        f"{cell.size}, {cell.strategy}, {cell.ranks} ranks: {cell.training_bytes() / 1e9:.1f} GB of training and "
        f"{cell.arena_bytes(kept) / 1e9:.1f} GB of arenas with {kept} kept shards, {free_bytes / 1e9:.1f} GB are free"
    )
    return Fit(kept if needed(kept) <= free_bytes else None, reason)
