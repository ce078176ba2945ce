"""The stamp of a slot, which identifies its shard and snapshot, and the schemas of its fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_ckptless.formats.schema import MOST_RANKS, RANK, STEP, boolean, integer, one_of, record, text
from lightning_ckptless.protocol.versions import SlotState, Snapshot, Version

MOST_SLOTS = 99_999
GENERATION = integer(0, 1 << 40)
WORLD_SIZE = integer(1, MOST_RANKS)
CHECKSUM = text(r"[\w:*+=]*", longest=256)
VERSION = record(Version, optimizer_step=STEP, validation_done=boolean)
LAYOUT = text(r"[\w-]*", longest=128)
SNAPSHOT = record(Snapshot, version=VERSION, generation=GENERATION, world_size=WORLD_SIZE, layout=LAYOUT)


@dataclass(frozen=True)
class Stamp:
    """What a slot contains or is about to contain.

    Args:
        version: version of the state.
        generation: generation that writes it.
        world_size: number of shards of the version.
        layout: digest of the layout with which it is written.
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
        """The snapshot that the slot is a part of."""
        return Snapshot(self.version, self.generation, self.world_size, self.layout)


STAMP = record(
    Stamp, version=VERSION, generation=GENERATION, world_size=WORLD_SIZE, layout=LAYOUT, shard=RANK, holder=RANK
)


def slot_state(value: Any, path: str) -> SlotState:
    """The schema of a slot's state."""
    return SlotState(one_of(*SlotState)(value, path))
