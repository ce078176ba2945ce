"""The arena of a node in memory, and the mirror that writes into it.

The rules of the commit protocol are those of a real run: `SlotRing` chooses the slots, and `advance` allows what is
done to each. The mirror of a real run works in a thread, on tensors; this one works in events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from lightning_ckptless.errors import TransportError
from lightning_ckptless.protocol.placement import Placement
from lightning_ckptless.protocol.slots import SlotEvent, SlotView, advance
from lightning_ckptless.protocol.versions import Replica, SlotState, Version
from lightning_ckptless.replica.arena import LEAST_SLOTS
from lightning_ckptless.replica.arena_notes import ArenaNotes
from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.slot_ring import SlotRing
from lightning_ckptless.replica.slot_stamp import Stamp
from tests.simulation.network import Group
from tests.simulation.tasks import Scheduler, Waiting

BULK_BYTES = 16
NOWHERE = Path("/nonexistent")


@dataclass(frozen=True)
class FlatLayout:
    """A layout in which every rank needs its own shard alone.

    Args:
        world_size: number of shards.
    """

    world_size: int

    @property
    def digest(self) -> str:
        """Its name."""
        return f"flat-{self.world_size}"

    @property
    def need(self) -> dict[int, tuple[int, ...]]:
        """For each rank, the shards that it needs."""
        return {rank: (rank,) for rank in range(self.world_size)}

    def to_bytes(self) -> bytes:
        """The layout as bytes."""
        return self.digest.encode()


class MemorySlot:
    """A slot; see `replica.slot.Slot`.

    Args:
        shard: its shard.
        holder: rank that keeps this copy.
        index: in its ring.
    """

    def __init__(self, shard: int, holder: int, index: int) -> None:
        self.shard = shard
        self.holder = holder
        self.index = index
        self.state = SlotState.EMPTY
        self.stamp: Stamp | None = None
        self.bulk = torch.zeros(BULK_BYTES, dtype=torch.uint8)
        self.blob = b""

    @property
    def view(self) -> SlotView:
        """The header as the commit protocol sees it."""
        if self.stamp is None or self.state is SlotState.EMPTY:
            return SlotView()
        return SlotView(self.state, self.stamp.snapshot)

    def begin(self, stamp: Stamp) -> None:
        """See `Slot.begin`."""
        self._change(SlotEvent.BEGIN, stamp)
        self.stamp = stamp

    def seal(self, stamp: Stamp, blob: bytes | memoryview, checksum: str) -> None:
        """See `Slot.seal`."""
        assert self.stamp == stamp, f"sealed as {stamp}, begun as {self.stamp}"
        self._change(SlotEvent.SEAL, stamp)
        self.blob = bytes(blob)

    def commit(self) -> None:
        """See `Slot.commit`."""
        self._change(SlotEvent.COMMIT, self.stamp)

    def discard(self) -> None:
        """See `Slot.discard`."""
        self._change(SlotEvent.DISCARD, self.stamp)

    def close(self) -> None:
        """Nothing is open."""

    def _change(self, event: SlotEvent, stamp: Stamp | None) -> None:
        version = None if stamp is None else stamp.version
        self.state = advance(self.state, event, shard=self.shard, rank=self.holder, version=version)

    def replica(self, node: str) -> Replica | None:
        """The slot as an entry of an inventory; None if it is empty."""
        snapshot, stamp = self.view.snapshot, self.stamp
        if snapshot is None or stamp is None:
            return None
        return Replica(
            self.shard, self.holder, node, self.index, snapshot.version, snapshot.generation, snapshot.world_size,
            snapshot.layout, self.state, BULK_BYTES, len(self.blob), "",
        )  # fmt: skip


class MemoryArena:
    """The arena of a node, which outlives its workers; see `replica.arena.Arena`.

    Args:
        node: name of the node.
    """

    path = NOWHERE

    def __init__(self, node: str) -> None:
        self.node = node
        self._notes = ArenaNotes()
        self._rings: dict[tuple[int, int, str], tuple[MemorySlot, ...]] = {}

    def notes(self) -> ArenaNotes:
        """See `Arena.notes`."""
        return self._notes

    def write_notes(self, notes: ArenaNotes) -> None:
        """See `Arena.write_notes`."""
        unset = vars(ArenaNotes())
        self._notes = replace(
            self._notes, **{name: value for name, value in vars(notes).items() if value != unset[name]}
        )

    def slots(
        self, shard: int, holder: int, bulk_bytes: int, *, layout: str = "", count: int = LEAST_SLOTS
    ) -> tuple[MemorySlot, ...]:
        """See `Arena.slots`."""
        assert bulk_bytes == BULK_BYTES
        key = shard, holder, layout
        if key not in self._rings:
            self._rings[key] = tuple(MemorySlot(shard, holder, index) for index in range(count))
        return self._rings[key]

    def inventory(self) -> tuple[Replica, ...]:
        """See `Arena.inventory`."""
        slots = (slot for ring in self._rings.values() for slot in ring)
        return tuple(replica for slot in slots if (replica := slot.replica(self.node)) is not None)

    def verify(self, replica: Replica, threads: int = 1) -> bool:
        """See `Arena.verify`: nothing is damaged, but a slot may have been overwritten."""
        return self._slot(replica).replica(self.node) == replica

    def read_bulk(self, replica: Replica) -> torch.Tensor:
        """See `Arena.read_bulk`."""
        return self._slot(replica).bulk

    def read_blob(self, replica: Replica) -> bytes:
        """See `Arena.read_blob`."""
        return self._slot(replica).blob

    def read_layout(self, digest: str) -> FlatLayout:
        """See `Arena.read_layout`."""
        return FlatLayout(int(digest.removeprefix("flat-")))

    def _slot(self, replica: Replica) -> MemorySlot:
        return self._rings[replica.shard, replica.holder, replica.layout][replica.slot]


@dataclass(frozen=True)
class Place:
    """Where a rank mirrors its versions in one generation.

    Args:
        scheduler: runs the simulation.
        group: connections to the other ranks.
        rank: this rank.
        arena: of its node.
        placement: which rank keeps which copies.
        generation: number of the generation.
    """

    scheduler: Scheduler
    group: Group
    rank: int
    arena: MemoryArena
    placement: Placement
    generation: int


class SimulatedMirror:
    """The mirror of one rank in one generation; see `replica.mirror.mirror.Mirror`.

    Args:
        place: where it mirrors.
        committed: newest version that has all its copies; None if the run starts from scratch.
        is_alive: whether its process runs.
        ring_of: makes a ring; a weaker one has to be detected.
        when_committed: called with each version that this rank knows to be committed, and the history of its state.
    """

    def __init__(
        self,
        place: Place,
        committed: Version | None,
        is_alive: Callable[[], bool],
        ring_of: Callable[[Any, Version | None], SlotRing],
        when_committed: Callable[[Version, int], None],
    ) -> None:
        self.committed = committed
        self._place = place
        self._layout = FlatLayout(place.group.world_size)
        self._is_alive = is_alive
        self._when_committed = when_committed
        self._is_closed = self._is_busy = self._has_failed = False
        self._waiting: Waiting = []
        self._rings = {
            shard: ring_of(place.arena.slots(shard, place.rank, BULK_BYTES, layout=self._layout.digest), committed)
            for shard in (place.rank, *place.placement.sources(place.rank))
        }

    def submit(self, version: Version, bulk: torch.Tensor, blob: bytes, copy_s: float) -> None:
        """Wait until the last round has ended, and begin that of a version.

        Raises:
            TransportError: a peer is lost.
        """
        self.settle()
        self._is_busy = True
        slot = self._begin(self._place.rank, version)
        self._later(copy_s, partial(self._send, version, slot, bulk.clone(), blob))

    def settle(self) -> None:
        """Wait until the last round has ended.

        Raises:
            TransportError: a peer is lost.
        """
        self._place.scheduler.wait_for(self._waiting, lambda: not self._is_busy or self._has_failed)
        if self._has_failed:
            raise TransportError(f"rank {self._place.rank}: the mirror has lost a peer")

    def close(self) -> None:
        """End the round in progress, whatever becomes of it on other ranks."""
        self._is_closed = True

    def _begin(self, shard: int, version: Version) -> MemorySlot:
        slot = cast("MemorySlot", self._rings[shard].free())
        slot.begin(self._stamp(shard, version))
        return slot

    def _send(self, version: Version, slot: MemorySlot, bulk: torch.Tensor, blob: bytes) -> None:
        slot.bulk.copy_(bulk)
        slot.seal(self._stamp(self._place.rank, version), blob, "")

        def received(values: list[Any]) -> None:
            self._write(version, slot, values)

        self._enter(f"exchange {version}", (bytes(bytes_of(bulk)), blob), received)

    def _write(self, version: Version, own: MemorySlot, values: list[Any]) -> None:
        slots = {shard: self._begin(shard, version) for shard in self._rings if shard != self._place.rank}

        def seal() -> None:
            for shard, slot in slots.items():
                bulk, blob = values[shard]
                bytes_of(slot.bulk)[:] = bulk
                slot.seal(self._stamp(shard, version), blob, "")
            self._enter(f"vote {version}", True, lambda _: self._commit(version, {**slots, self._place.rank: own}))

        self._later(0.002, seal)

    def _commit(self, version: Version, slots: Mapping[int, MemorySlot]) -> None:
        for shard, ring in self._rings.items():
            ring.commit(cast("Any", slots[shard]))
        self.committed = version
        self._is_busy = False
        self._place.scheduler.notify(self._waiting)
        history = int(slots[self._place.rank].bulk.view(torch.int64)[1])
        self._when_committed(version, history)

    def _enter(self, kind: str, value: Any, then: Callable[[list[Any]], None]) -> None:
        def done(values: list[Any] | None) -> None:
            if self._is_closed or not self._is_alive():
                return
            if values is None:
                self._has_failed = True
                self._place.scheduler.notify(self._waiting)
            else:
                then(values)

        self._place.group.enter(self._place.rank, "mirror", kind, value, done)

    def _later(self, mean_s: float, action: Callable[[], None]) -> None:
        def act() -> None:
            if not self._is_closed and self._is_alive():
                action()

        self._place.scheduler.later(mean_s, act)

    def _stamp(self, shard: int, version: Version) -> Stamp:
        place = self._place
        layout = self._layout
        return Stamp(version, place.generation, layout.world_size, layout.digest, shard, place.rank)
