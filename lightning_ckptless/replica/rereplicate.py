"""Restore a version to its full number of copies before the previous version is overwritten.

A version may be complete with fewer copies than required: its writers died before their holders had everything, a node
came back empty, or a copy is damaged. The mirror then overwrites the version before it, so this version is the only one
left. Its missing copies are therefore filled in first, and carry the snapshot that they complete. All ranks compute the
missing copies from what they restored. If there are none, as is usual, no message is sent.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from lightning_ckptless.errors import StateMissingError
from lightning_ckptless.protocol.placement import Placement
from lightning_ckptless.protocol.slots import absent_copies, newest_committed, refill_slot
from lightning_ckptless.protocol.transfers import Read, Send, Transfer, plan_copies
from lightning_ckptless.protocol.versions import Complete, Replica, SlotState, Snapshot
from lightning_ckptless.protocol.wording import counted
from lightning_ckptless.replica.arena import LEAST_SLOTS, Arena
from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.restore import gather_inventory, gather_replicas
from lightning_ckptless.replica.slot import Slot
from lightning_ckptless.replica.slot_stamp import Stamp
from lightning_ckptless.replica.transport import Message, Transport, receive_buffer, tensor_of


@dataclass(frozen=True)
class Rereplicated:
    """The copies that were filled in by all ranks.

    Args:
        copied_bytes: bytes of tensor state and host state, over all ranks.
        sent_bytes: bytes of those that came from another node.
        pairs: shard and holder of each copy.
        reason: summary, one sentence.
    """

    copied_bytes: int
    sent_bytes: int
    pairs: tuple[tuple[int, int], ...]
    reason: str


def rereplicate(
    found: Complete,
    arena: Arena,
    transport: Transport,
    nodes: Sequence[str],
    placement: Placement,
    *,
    slots: int = LEAST_SLOTS,
) -> Rereplicated:
    """Fill in the copies that a restored version lacks, and commit them on all ranks or on none.

    Slots mapped for the restore are not modified: only slots without an intact copy are written. When this returns,
    every slot ring that a mirror opens with this placement contains the version.

    Args:
        found: the version, as `choose` returned it on all ranks; nothing was written into the arenas since.
        arena: arena of this node; it contains the layout of the version.
        transport: transport between all ranks.
        nodes: name of each rank's node.
        placement: placement of the shards.
        slots: number of slots of each ring.

    Raises:
        StateMissingError: the last copy of a shard was damaged after the restore.
        ArenaError: the slots do not fit.
        TransportError: a peer is lost.
    """
    found, plan = _plan(found, arena, transport, nodes, placement)
    if not plan:
        return Rereplicated(0, 0, (), f"{found.snapshot.version} has all its copies")
    inventory = gather_inventory(arena, transport, reads=transport.rank == nodes.index(nodes[transport.rank]))
    with ExitStack() as opened:
        written = _fill_in(plan, arena, transport, found.snapshot, newest_committed(inventory), opened, slots)
        agreed = transport.agree(True)
        assert agreed, "a rank that cannot fill in its copies raises"
        for slot in written:
            slot.commit()
    return _summary(found, plan)


def _plan(
    found: Complete, arena: Arena, transport: Transport, nodes: Sequence[str], placement: Placement
) -> tuple[Complete, tuple[Transfer, ...]]:
    """Plan the transfers from intact replicas only; returns the version without the damaged ones, and the plan."""
    good: set[Replica] = set()
    while True:
        plan = plan_copies(found, nodes, absent_copies(found, placement.holders, nodes))
        unverified = {step.replica for step in plan} - good
        if not unverified:
            return found, plan
        mine = {step.replica for step in plan if _source_rank(step) == transport.rank} - good
        bad = set(gather_replicas((replica for replica in mine if not arena.verify(replica)), transport))
        good |= unverified - bad
        found = _without(found, bad)


def _without(found: Complete, bad: Collection[Replica]) -> Complete:
    kept = tuple(tuple(replica for replica in replicas if replica not in bad) for replicas in found.replicas)
    for shard, left in enumerate(kept):
        if not left:
            raise StateMissingError(
                f"shard {shard} of {found.snapshot.version} was intact when it was restored, but all its "
                f"{len(found.replicas[shard])} replicas are damaged now: the memory of {found.replicas[shard][0].node} "
                "may be faulty"
            )
    return replace(found, replicas=kept)


def _fill_in(
    plan: Sequence[Transfer],
    arena: Arena,
    transport: Transport,
    restored: Snapshot,
    committed: Snapshot | None,
    opened: ExitStack,
    slots: int,
) -> list[Slot]:
    """Send this rank's part of the plan and seal the copies that it receives; returns their slots, still open."""
    rank = transport.rank
    sends: list[Message] = []
    receives: list[Message] = []
    arriving: list[tuple[Slot, Replica, torch.Tensor]] = []
    for step in plan:
        source = step.replica
        if isinstance(step, Send) and step.source_rank == rank:
            sends += _messages(step.target_rank, source, arena.read_bulk(source), tensor_of(arena.read_blob(source)))
        if _target_rank(step) != rank:
            continue
        slot = _begin(arena, source, rank, restored, committed, slots)
        opened.callback(slot.close)
        if isinstance(step, Send):
            blob = receive_buffer(source.blob_bytes)
            receives += _messages(step.source_rank, source, slot.bulk, blob)
        else:
            blob = tensor_of(arena.read_blob(source))
            slot.bulk.copy_(arena.read_bulk(source))
        arriving.append((slot, source, blob))
    transport.exchange(sends, receives)
    for slot, source, blob in arriving:
        slot.seal(_stamp(source, rank), bytes_of(blob), source.checksum)
    return [slot for slot, _, _ in arriving]


def _messages(peer: int, replica: Replica, bulk: torch.Tensor, blob: torch.Tensor) -> list[Message]:
    return [(peer, 2 * replica.shard, bulk), (peer, 2 * replica.shard + 1, blob)]


def _begin(
    arena: Arena, source: Replica, rank: int, restored: Snapshot, committed: Snapshot | None, slots: int
) -> Slot:
    ring = arena.slots(source.shard, rank, source.bulk_bytes, layout=source.layout, count=slots)
    slot = ring[refill_slot([each.view for each in ring], restored, committed)]
    for other in ring:
        if other is not slot:
            other.close()
    if slot.view.state in (SlotState.WRITING, SlotState.STAGED):
        slot.discard()
    slot.begin(_stamp(source, rank))
    return slot


def _stamp(source: Replica, rank: int) -> Stamp:
    """The stamp of a new copy, which carries the generation that wrote the restored version."""
    return Stamp(source.version, source.generation, source.world_size, source.layout, source.shard, rank)


def _source_rank(step: Transfer) -> int:
    return step.rank if isinstance(step, Read) else step.source_rank


def _target_rank(step: Transfer) -> int:
    return step.rank if isinstance(step, Read) else step.target_rank


def _summary(found: Complete, plan: Sequence[Transfer]) -> Rereplicated:
    sent = [step for step in plan if isinstance(step, Send)]
    copied_bytes = sum(step.replica.bulk_bytes + step.replica.blob_bytes for step in plan)
    return Rereplicated(
        copied_bytes=copied_bytes,
        sent_bytes=sum(step.sent_bytes for step in sent),
        pairs=tuple(sorted((step.replica.shard, _target_rank(step)) for step in plan)),
        reason=(
            f"filled in {counted(len(plan), 'missing copy', 'missing copies')} of {found.snapshot.version}, "
            f"{copied_bytes / 1e6:.1f} MB: {len(plan) - len(sent)} from the same node, {len(sent)} from other nodes"
        ),
    )
