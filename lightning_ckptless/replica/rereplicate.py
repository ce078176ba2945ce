"""Bring a restored version back to its full number of copies, before anything is written over the version before it.

A version may be whole with fewer copies than it should have: its writers died before their holders had everything, a
node came back empty, a copy was found damaged. From then on it has to carry the run alone, as its mirror writes over
the version before. So the copies that it lacks are filled in first, as copies of what they complete. All ranks compute
from what they restored which ones those are; where none is, as usual, nothing is sent, not even a question.
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
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.restore import gather_inventory, gather_replicas
from lightning_ckptless.replica.slot import Slot
from lightning_ckptless.replica.slot_stamp import Stamp
from lightning_ckptless.replica.transport import Parcel, Transport, room, tensor_of


@dataclass(frozen=True)
class Rereplicated:
    """What was filled in, by all ranks together.

    Args:
        copied_bytes: bytes of tensors and host state, all ranks.
        sent_bytes: how many of them came from another node.
        pairs: shard and holder of each copy.
        reason: the finding in a sentence.
    """

    copied_bytes: int
    sent_bytes: int
    pairs: tuple[tuple[int, int], ...]
    reason: str


def rereplicate(
    found: Complete, arena: Arena, transport: Transport, nodes: Sequence[str], placement: Placement
) -> Rereplicated:
    """Fill in the copies that a restored version lacks, and commit them on all ranks or on none.

    What was mapped from the arenas for the restore stays as it is: only slots without a good copy are written. When
    this returns, every slot_pair that a mirror is about to open with this placement holds the version.

    Args:
        found: the version, as `choose` returned it to all ranks; nothing was written into the arenas since.
        arena: the own node's arena; it has the layout of the version.
        transport: between all ranks.
        nodes: name of each rank's node.
        placement: who is to keep what.

    Raises:
        StateMissingError: the last copy of a shard was damaged after the restore.
        ArenaError: the slots do not fit.
        TransportError: a peer is gone.
    """
    found, plan = _plan(found, arena, transport, nodes, placement)
    if not plan:
        return Rereplicated(0, 0, (), f"{found.snapshot.version} has all its copies")
    inventory = gather_inventory(arena, transport, reads=transport.rank == nodes.index(nodes[transport.rank]))
    with ExitStack() as opened:
        written = _fill_in(plan, arena, transport, found.snapshot, newest_committed(inventory), opened)
        agreed = transport.agree(True)
        assert agreed, "a rank that cannot fill in its copies raises"
        for slot in written:
            slot.commit()
    return _summary(found, plan)


def _plan(
    found: Complete, arena: Arena, transport: Transport, nodes: Sequence[str], placement: Placement
) -> tuple[Complete, tuple[Transfer, ...]]:
    """Who copies what from where, using sources only whose bytes are right, and the version without the others."""
    good: set[Replica] = set()
    while True:
        plan = plan_copies(found, nodes, absent_copies(found, placement.holders, nodes))
        sources = {step.replica for step in plan} - good
        if not sources:
            return found, plan
        mine = {step.replica for step in plan if _source_rank(step) == transport.rank} - good
        bad = set(gather_replicas((replica for replica in mine if not arena.verify(replica)), transport))
        good |= sources - bad
        found = _without(found, bad)


def _without(found: Complete, bad: Collection[Replica]) -> Complete:
    kept = tuple(tuple(replica for replica in replicas if replica not in bad) for replicas in found.replicas)
    for shard, left in enumerate(kept):
        if not left:
            raise StateMissingError(
                f"shard {shard} of {found.snapshot.version} was whole when it was restored, and all its "
                f"{len(found.replicas[shard])} replicas are damaged now: the memory of {found.replicas[shard][0].node} "
                "is not to be trusted"
            )
    return replace(found, replicas=kept)


def _fill_in(
    plan: Sequence[Transfer],
    arena: Arena,
    transport: Transport,
    restored: Snapshot,
    committed: Snapshot | None,
    opened: ExitStack,
) -> list[Slot]:
    """Send what this rank has to give, and seal the copies that it is to keep; returns their slots, still open."""
    rank = transport.rank
    sends: list[Parcel] = []
    receives: list[Parcel] = []
    arriving: list[tuple[Slot, Replica, torch.Tensor]] = []
    for step in plan:
        source = step.replica
        if isinstance(step, Send) and step.source_rank == rank:
            sends += _parcels(step.target_rank, source, arena.read_bulk(source), tensor_of(arena.read_blob(source)))
        if _target_rank(step) != rank:
            continue
        slot = _begin(arena, source, rank, restored, committed)
        opened.callback(slot.close)
        if isinstance(step, Send):
            blob = room(source.blob_bytes)
            receives += _parcels(step.source_rank, source, slot.bulk, blob)
        else:
            blob = tensor_of(arena.read_blob(source))
            slot.bulk.copy_(arena.read_bulk(source))
        arriving.append((slot, source, blob))
    transport.exchange(sends, receives)
    for slot, source, blob in arriving:
        slot.seal(_stamp(source, rank), bytes_of(blob), source.checksum)
    return [slot for slot, _, _ in arriving]


def _parcels(peer: int, replica: Replica, bulk: torch.Tensor, blob: torch.Tensor) -> list[Parcel]:
    return [(peer, 2 * replica.shard, bulk), (peer, 2 * replica.shard + 1, blob)]


def _begin(arena: Arena, source: Replica, rank: int, restored: Snapshot, committed: Snapshot | None) -> Slot:
    pair = arena.slots(source.shard, rank, source.bulk_bytes, layout=source.layout)
    number = refill_slot((pair[0].view, pair[1].view), restored, committed)
    pair[1 - number].close()
    slot = pair[number]
    if slot.view.state in (SlotState.WRITING, SlotState.STAGED):
        slot.discard()
    slot.begin(_stamp(source, rank))
    return slot


def _stamp(source: Replica, rank: int) -> Stamp:
    """The new copy is a copy of what was restored: it carries the generation that wrote that."""
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
            f"{len(plan)} copies that {found.snapshot.version} lacked were filled in, {copied_bytes / 1e6:.1f} MB: "
            f"{len(plan) - len(sent)} from their own nodes, {len(sent)} from other nodes"
        ),
    )
