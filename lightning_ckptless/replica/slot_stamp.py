"""The stamp of a slot: which shard of which state it is about to hold; and what the numbers in it may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_ckptless.formats.schema import MOST_RANKS, boolean, integer, one_of, record, text
from lightning_ckptless.protocol.versions import SlotState, Snapshot, Version

STEP = integer()
GENERATION = integer(0, 1 << 40)
WORLD_SIZE = integer(1, MOST_RANKS)
RANK = integer(0, MOST_RANKS - 1)
BYTES = integer()
CHECKSUM = text(r"[\w:*+=]*", longest=256)
VERSION = record(Version, optimizer_step=STEP, validation_done=boolean)
LAYOUT = text(r"[\w-]*", longest=128)
SNAPSHOT = record(Snapshot, version=VERSION, generation=GENERATION, world_size=WORLD_SIZE, layout=LAYOUT)


@dataclass(frozen=True)
class Stamp:
    """What a slot is about to hold.

    Args:
        version: the version of the state.
        generation: number of the membership that writes it.
        world_size: number of shards of the version.
        layout: digest of the layout it is written with.
        shard: index of the shard.
        holder: rank that keeps this copy.
    """

    version: Version
    generation: int
    world_size: int
    layout: str
    shard: int
    holder: int

    @property
    def snapshot(self) -> Snapshot:
        """The state that the slot is a part of."""
        return Snapshot(self.version, self.generation, self.world_size, self.layout)


STAMP = record(
    Stamp, version=VERSION, generation=GENERATION, world_size=WORLD_SIZE, layout=LAYOUT, shard=RANK, holder=RANK
)


def slot_state(value: Any, place: str) -> SlotState:
    """The check of how far the writing of a slot has come."""
    return SlotState(one_of(*SlotState)(value, place))
