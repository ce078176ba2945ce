"""From what the arenas hold back to live tensors: choose a version, fetch its shards, fill the tensors in place.

All ranks call these functions together, gather the same facts and compute the same plans from them, so no rank leads.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_ckptless.errors import StateMissingError
from lightning_ckptless.protocol.transfers import Read, Send, Transfer, plan_transfers
from lightning_ckptless.protocol.versions import Complete, Missing, Replica, SlotState, Version, newest_complete
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.layout import Layout, live_views, slot_views
from lightning_ckptless.replica.transport import Parcel, Transport, room, tensor_of
from lightning_ckptless.torch_internals import foreach_copy

OWN_ARENA = "own arena"
PEER = "peer"
BULK, BLOB = range(2)

Need = Mapping[int, Collection[int]]
"""Which shards each rank needs, by rank."""


@dataclass(frozen=True)
class Fetched:
    """A version, brought to this rank.

    Args:
        bulks: tensor part of each needed shard: mapped from the own arena, or received.
        blob: this rank's small state.
        moved_bytes: bytes received from peers.
        sources: number of shards from the `own arena` and from a `peer`.
    """

    bulks: dict[int, torch.Tensor]
    blob: bytes
    moved_bytes: int
    sources: dict[str, int]


def gather_inventory(arena: Arena, transport: Transport, *, reads: bool) -> tuple[Replica, ...]:
    """What the arenas of all nodes hold.

    Args:
        arena: the own node's arena.
        transport: between all ranks.
        reads: whether this rank speaks for its node: one rank of each does.
    """
    mine = [asdict(replica) for replica in arena.inventory()] if reads else []
    everyone = transport.gather(json.dumps(mine).encode())
    return tuple(_replica(fields) for line in everyone for fields in json.loads(line))


def choose(
    arena: Arena, transport: Transport, nodes: Sequence[str], *, need: Need | None = None
) -> Complete | Missing:
    """Choose the newest version that is complete and whose bytes are as they were written.

    Only the replicas that would be used are read; where one is damaged, the choice is made again without it.

    Args:
        arena: the own node's arena.
        transport: between all ranks.
        nodes: name of each rank's node.
        need: which shards each rank needs; None for all on all ranks.
    """
    rank = transport.rank
    neighbours = [other for other, node in enumerate(nodes) if node == nodes[rank]]
    inventory = gather_inventory(arena, transport, reads=rank == neighbours[0])
    bad: set[Replica] = set()
    good: set[Replica] = set()
    while True:
        found = newest_complete(inventory, bad=bad)
        if isinstance(found, Missing):
            return found
        plan = plan_transfers(found, nodes, need or _all_everywhere(found, nodes))
        used = {step.replica for step in plan} - good
        if not used:
            return found
        here = sorted((replica for replica in used if replica.node == arena.node), key=_place_of)
        mine = here[neighbours.index(rank) :: len(neighbours)]
        damaged = [asdict(replica) for replica in mine if not arena.verify(replica)]
        for line in transport.gather(json.dumps(damaged).encode()):
            bad.update(_replica(fields) for fields in json.loads(line))
        good |= used - bad


def fetch(
    complete: Complete, arena: Arena, transport: Transport, nodes: Sequence[str], *, need: Need | None = None
) -> Fetched:
    """Bring the shards of a version to every rank that needs them, and to each rank its own small state.

    Args:
        complete: what `choose` returned.
        arena: the own node's arena.
        transport: between all ranks.
        nodes: name of each rank's node.
        need: which shards each rank needs; None for all on all ranks.

    Raises:
        TransportError: a peer is gone.
    """
    rank = transport.rank
    plan = plan_transfers(complete, nodes, need or _all_everywhere(complete, nodes))
    bulks: dict[int, torch.Tensor] = {}
    blob = b""
    for step in plan:
        if isinstance(step, Read) and step.rank == rank:
            shard = step.replica.shard
            bulks[shard] = arena.read_bulk(step.replica)
            if shard == rank:
                blob = arena.read_blob(step.replica)
    sends = [parcel for step in plan if _sender(step) == rank for parcel in _parcels(step, arena)]
    rooms = {step.shard: _rooms(step) for step in plan if isinstance(step, Send) and step.target_rank == rank}
    receives = [parcel for parcels in rooms.values() for parcel in parcels]
    transport.exchange(sends, receives)
    bulks |= {shard: parcels[0][2] for shard, parcels in rooms.items()}
    if rank in rooms:
        blob = bytes(bytes_of(rooms[rank][1][2]))
    return Fetched(
        bulks=bulks,
        blob=blob,
        moved_bytes=sum(room.numel() for _, _, room in receives),
        sources={OWN_ARENA: len(bulks) - len(rooms), PEER: len(rooms)},
    )


def fill(layout: Layout, bulks: Mapping[int, torch.Tensor], tensors: Mapping[str, torch.Tensor], rank: int) -> int:
    """Copy shards into live tensors, in place.

    Args:
        layout: how the state is cut.
        bulks: tensor part of each shard.
        tensors: live tensors by name.
        rank: this rank: of private tensors it takes its own.

    Returns:
        Bytes copied.
    """
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for shard, bulk in bulks.items():
        targets += live_views(layout, shard, rank, tensors)
        sources += slot_views(layout, shard, bulk, rank=rank)
    with torch.no_grad():
        foreach_copy(targets, sources)
    return sum(source.nbytes for source in sources)


def shared_layout(arena: Arena, transport: Transport, digest: str) -> Layout:
    """The layout with a digest, from the first rank whose arena has it; those without it keep it from here on.

    Args:
        arena: the own node's arena.
        transport: between all ranks.
        digest: of the layout.

    Raises:
        StateMissingError: no arena has it.
    """
    mine = arena.read_layout(digest)
    having = [rank for rank, said in enumerate(transport.gather(b"1" if mine is not None else b"")) if said]
    if not having:
        raise StateMissingError(
            f"rank {transport.rank}: no arena has layout {digest}, without which its replicas cannot be read: remove "
            f"them with `ckptless clean`"
        )
    teller = having[0]
    sent = mine.to_bytes() if mine is not None and transport.rank == teller else b""
    told = transport.gather(sent)[teller]
    if mine is None:
        mine = Layout.from_bytes(told)
        arena.write_layout(mine)
    return mine


def _sender(step: Transfer) -> int | None:
    return step.source_rank if isinstance(step, Send) else None


def _parcels(step: Transfer, arena: Arena) -> list[Parcel]:
    """What is sent for a step: the bulk, and the small state to the rank that wrote it."""
    assert isinstance(step, Send)
    parcels = [(step.target_rank, _tag(step.shard, BULK), arena.read_bulk(step.replica))]
    if step.shard == step.target_rank:
        parcels.append((step.target_rank, _tag(step.shard, BLOB), tensor_of(arena.read_blob(step.replica))))
    return parcels


def _rooms(step: Send) -> list[Parcel]:
    """Where the same parcels go at the receiver."""
    lengths = [(BULK, step.replica.bulk_bytes), (BLOB, step.replica.blob_bytes)]
    parts = lengths if step.shard == step.target_rank else lengths[:1]
    return [(step.source_rank, _tag(step.shard, part), room(length_bytes)) for part, length_bytes in parts]


def _tag(shard: int, part: int) -> int:
    return 2 * shard + part


def _all_everywhere(complete: Complete, nodes: Sequence[str]) -> Need:
    return {rank: range(complete.snapshot.world_size) for rank in range(len(nodes))}


def _place_of(replica: Replica) -> tuple[int, int, int]:
    return replica.shard, replica.keeper, replica.slot


def _replica(fields: dict[str, Any]) -> Replica:
    return Replica(**(fields | {"version": Version(**fields["version"]), "state": SlotState(fields["state"])}))
