"""What a rank keeps in device memory: the shards, and which of their pieces its own live tensors contain.

Most pieces stay in the live tensors until the next optimizer step, equal on all ranks. *Early* pieces do not: buffers,
which a forward pass changes and which differ between ranks; parameters that a hook writes to; tensors that only some
ranks have; and tensors that are not on the device, such as step counters. They are copied at the commit point and
travel with the host state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from lightning_ckptless.internals.torch_internals import foreach_copy, version_counter
from lightning_ckptless.replica.layout.layout import Chunk, Layout, local_name, part_of, slot_view


@dataclass(frozen=True)
class DevicePlan:
    """The shards that a rank keeps in device memory.

    Args:
        layout: layout of the state.
        rank: this rank.
        shards: its own shard and those that it holds for other ranks.
        hooked: names of the parameters that a hook may write to before the optimizer steps.
        off_device: names of the tensors that are not on the device.
        device: where the slots are.
    """

    layout: Layout
    rank: int
    shards: tuple[int, ...]
    hooked: frozenset[str]
    off_device: frozenset[str]
    device: torch.device

    def early(self, shard: int) -> tuple[Chunk, ...]:
        """The pieces of a shard that its writer sends."""
        return tuple(chunk for chunk in self.layout.of(shard) if self._is_early(chunk))

    def early_bytes(self, shard: int) -> int:
        """Length of the early pieces of a shard."""
        return sum(chunk.nbytes for chunk in self.early(shard))

    @cached_property
    def own_early(self) -> tuple[Chunk, ...]:
        """The early pieces of this rank's own shard."""
        return self.early(self.rank)

    @cached_property
    def late(self) -> tuple[tuple[int, Chunk], ...]:
        """The other pieces of all shards, each with its shard."""
        return tuple((s, chunk) for s in self.shards for chunk in self.layout.of(s) if not self._is_early(chunk))

    @cached_property
    def watched(self) -> tuple[str, ...]:
        """Names of the live tensors of the late pieces."""
        return tuple(dict.fromkeys(chunk.name for _, chunk in self.late))

    def live_part(self, chunk: Chunk, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A piece as a view of this rank's live tensors."""
        name = local_name(chunk, self.rank)
        return part_of(tensors[name], chunk, self.layout.held_by(self.rank)[name].box.offsets)

    def is_same(self, other: DevicePlan | None) -> bool:
        """Whether slots that were made for another plan fit this one."""
        return other is not None and self._key == other._key

    @property
    def _key(self) -> tuple[object, ...]:
        return self.layout.digest, self.rank, self.shards, self.hooked, self.off_device, self.device

    def _is_early(self, chunk: Chunk) -> bool:
        return chunk.holders != () or chunk.name in self.hooked or chunk.name in self.off_device


class DeviceSlots:
    """One slot per shard, in device memory.

    Args:
        plan: what they contain.
    """

    def __init__(self, plan: DevicePlan) -> None:
        self.plan = plan
        self.bulks = {
            shard: torch.empty(plan.layout.bulk_bytes(shard), dtype=torch.uint8, device=plan.device)
            for shard in plan.shards
        }
        self._identity: list[int] = []
        self._sources: list[torch.Tensor] = []
        self._targets = [slot_view(chunk, self.bulks[shard]) for shard, chunk in plan.late]

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Overwrite the late pieces with the live tensors, on the current stream of the device.

        Args:
            tensors: this rank's live tensors by name.
        """
        identity = [tensors[name].data_ptr() for name in self.plan.watched]
        if identity != self._identity:
            self._identity = identity
            self._sources = [self.plan.live_part(chunk, tensors) for _, chunk in self.plan.late]
        with torch.no_grad():
            foreach_copy(self._targets, self._sources, non_blocking=True)


def counters(names: tuple[str, ...], tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """Torch's counts of writes to tensors."""
    return [version_counter(tensors[name]) for name in names]
