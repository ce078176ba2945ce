"""The copies that a rank makes of its own tensors in a round: of its own shard, and of what it holds for other ranks.

Replicated tensors are not sent. A holder copies the pieces of a shard that its own tensors contain from these tensors,
at the same time as its own shard and by the same rules, and receives only the other pieces. Both sides compute the
digest of what they have written, so that a replica that differs is found in the round of its version.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from lightning_ckptless.replica.layout.layout import Layout, spans_lacked
from lightning_ckptless.replica.mirror.staging import PendingCopy, Stager
from lightning_ckptless.replica.slot import Slot
from lightning_ckptless.replica.slot_ring import SlotRing
from lightning_ckptless.replica.slot_stamp import Stamp


@dataclass(frozen=True)
class ShardCopy:
    """A copy that this rank makes of its tensors.

    Args:
        shard: index of the shard.
        slot: the slot that is filled.
        pending: the late part of the copy.
    """

    shard: int
    slot: Slot
    pending: PendingCopy


class ShardCopier:
    """Copies the pieces of shards that a rank's tensors contain.

    Args:
        layout: layout of the state.
        rank: this rank.
        rings: slot rings of the shards that are copied, by shard.
        buffered: whether tensors are copied into a buffer on their device first.
    """

    def __init__(self, layout: Layout, rank: int, rings: Mapping[int, SlotRing], *, buffered: bool = False) -> None:
        self._rank = rank
        self._rings = rings
        self._stagers = {shard: Stager(layout, rank, shard, buffered=buffered) for shard in rings}

    def take(
        self, stamp_of: Callable[[int], Stamp], tensors: Mapping[str, torch.Tensor], early: Collection[str]
    ) -> tuple[ShardCopy, ...]:
        """Start the copies, in the training thread: the own shard first.

        Args:
            stamp_of: stamp of a shard's slot.
            tensors: live tensors by name.
            early: names of the tensors to copy before this returns.

        Raises:
            LayoutMismatchError: a tensor of the layout is missing or has another shape.
        """
        copies = []
        for shard, stager in self._stagers.items():
            slot = self._rings[shard].free()
            slot.begin(stamp_of(shard))
            copies.append(ShardCopy(shard, slot, stager.take(slot.bulk, tensors, early)))
        return tuple(copies)

    def finish(self, copies: Sequence[ShardCopy], half_done: Callable[[], None], *, rewrites: bool) -> int:
        """Complete the copies, in any thread.

        Args:
            copies: the result of `take`.
            half_done: called after half of the own shard is copied.
            rewrites: whether static pieces are written even if the slots contain them.

        Returns:
            Number of bytes that were written into the slot of the own shard.
        """
        written_bytes = 0
        for copy in copies:
            if rewrites:
                copy.pending.static.forget()
            is_own = copy.shard == self._rank
            kept_bytes = self._stagers[copy.shard].finish(copy.pending, half_done if is_own else None)
            written_bytes += (copy.slot.bulk_bytes - kept_bytes) * is_own
        return written_bytes

    def close(self) -> None:
        """Unregister the slots, which are about to be unmapped."""
        for stager in self._stagers.values():
            stager.close()


def sent_spans(layout: Layout, shard: int, holder: int, *, verifies: bool) -> tuple[slice, ...]:
    """The spans of a shard's bulk that are sent to a holder.

    Args:
        layout: layout of the shard.
        shard: index of the shard.
        holder: the holder.
        verifies: whether it fills in what its own tensors contain.
    """
    if verifies:
        return spans_lacked(layout, shard, holder)
    edges = 0, layout.static_bytes(shard), layout.bulk_bytes(shard)
    return tuple(slice(start, end) for start, end in pairwise(edges) if end > start)
