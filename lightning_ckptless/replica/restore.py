"""Restore from the arenas and the device tier: choose a version, fetch its shards, and fill the live tensors in place.

All ranks call these functions together, gather the same inventory and compute the same plans, so no leader is needed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_ckptless.errors import StateMissingError, TransportError
from lightning_ckptless.formats.schema import BYTES, RANK, SchemaError, integer, one_of, record, refused, sequence
from lightning_ckptless.formats.sealed import parse
from lightning_ckptless.internals.torch_internals import foreach_copy
from lightning_ckptless.protocol.device_tier import restorable
from lightning_ckptless.protocol.transfers import Part, Read, Transfer, TransferPlan
from lightning_ckptless.protocol.versions import Complete, Missing, Replica, Tier, Version, newest_complete
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.arena_metadata import NODE
from lightning_ckptless.replica.broadcast import broadcast
from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.device_tier.device_tier import DeviceTier
from lightning_ckptless.replica.layout.layout import Layout, local_name, part_of, pieces_for, slot_view
from lightning_ckptless.replica.slot_stamp import (
    CHECKSUM,
    GENERATION,
    LAYOUT,
    MOST_SLOTS,
    VERSION,
    WORLD_SIZE,
    slot_state,
)
from lightning_ckptless.replica.thread_count import threads_of_a_rank
from lightning_ckptless.replica.transport import Message, Transport, gather_json, receive_buffer, tensor_of

OWN_ARENA = "own arena"
PEER = "peer"
DEVICE_TIER = "device tier"

Need = Mapping[int, Collection[int]]
"""The shards that each rank needs, by rank."""


@dataclass(frozen=True)
class Fetched:
    """The parts of a version that were fetched to this rank.

    Args:
        bulks: tensor state of each needed shard, mapped from the own arena or received.
        blobs: host state of each requested rank.
        received: ranks whose host state came from another node.
        moved_bytes: bytes received from peers.
        sources: number of shards from the `own arena`, from the arena of a `peer`, and from the `device tier`.
    """

    bulks: dict[int, torch.Tensor]
    blobs: dict[int, bytes]
    received: frozenset[int]
    moved_bytes: int
    sources: dict[str, int]


def gather_inventory(arena: Arena, transport: Transport, *, reads: bool) -> tuple[Replica, ...]:
    """The contents of the arenas of all nodes.

    Args:
        arena: arena of this node.
        transport: transport between all ranks.
        reads: whether this rank reads the arena for its node; exactly one rank per node does.
    """
    return gather_replicas(arena.inventory() if reads else (), transport)


def gather_replicas(mine: Iterable[Replica], transport: Transport) -> tuple[Replica, ...]:
    """Gather lists of replicas from all ranks.

    Args:
        mine: replicas of this rank's list.
        transport: transport between all ranks.

    Raises:
        TransportError: a peer sent invalid data.
    """
    everyone = transport.gather(json.dumps([asdict(replica) for replica in mine]).encode())
    try:
        return tuple(replica for payload in everyone for replica in _REPLICAS(parse(payload), ""))
    except SchemaError as error:
        raise TransportError(f"rank {transport.rank}: a peer sent an invalid inventory: {error}") from error


def choose(
    arena: Arena,
    transport: Transport,
    nodes: Sequence[str],
    *,
    need: Need | None = None,
    newest: Version | None = None,
    device: Iterable[Replica] = (),
) -> Complete | Missing:
    """Choose the newest version that is complete and undamaged.

    Only the replicas that the restore would use are verified. If one is damaged, the choice is repeated without it. If
    another number of ranks wrote the version, all shards count as used. Replicas in device memory have no checksum.

    Args:
        arena: arena of this node.
        transport: transport between all ranks.
        nodes: name of each rank's node.
        need: shards that each rank needs; None for those that contain its tensors.
        newest: disregard newer versions than this one; None to consider all.
        device: replicas in the device memory of this rank.

    Raises:
        StateMissingError: no arena contains the layout of the version.
    """
    rank = transport.rank
    neighbours = [other for other, node in enumerate(nodes) if node == nodes[rank]]
    readable = (*(arena.inventory() if rank == neighbours[0] else ()), *device)
    inventory = restorable(gather_replicas(readable, transport))
    inventory = tuple(replica for replica in inventory if newest is None or replica.version <= newest)
    threads = threads_of_a_rank(len(neighbours), beside_training=False)
    bad: set[Replica] = set()
    good: set[Replica] = set()
    while True:
        found = newest_complete(inventory, bad=bad)
        if isinstance(found, Missing):
            return found
        if has_other_world_size := found.snapshot.world_size != len(nodes):
            needed: Need = dict.fromkeys(range(len(nodes)), range(found.snapshot.world_size))
        else:
            needed = shared_layout(arena, transport, found.snapshot.layout).need if need is None else need
        plan = TransferPlan(found, nodes, needed, needed if has_other_world_size else None)
        local = sorted(plan.used_on(nodes[rank]) - good, key=_place_of)
        mine = local[neighbours.index(rank) :: len(neighbours)]
        damaged = gather_replicas((replica for replica in mine if not arena.verify(replica, threads)), transport)
        if not damaged:
            return found
        bad.update(damaged)
        good.update(set(local) - bad)


def fetch(
    complete: Complete,
    arena: Arena,
    transport: Transport,
    nodes: Sequence[str],
    *,
    need: Need,
    blobs: Need | None = None,
    device: DeviceTier | None = None,
) -> Fetched:
    """Fetch the tensor state and host state of a version to every rank that needs them.

    Args:
        complete: the version, as returned by `choose`.
        arena: arena of this node.
        transport: transport between all ranks.
        nodes: name of each rank's node.
        need: shards whose tensor state each rank needs, as passed to `choose`.
        blobs: shards whose host state each rank needs; None for its own shard only.
        device: device tier of this rank; None if there is none.

    Raises:
        TransportError: a peer is lost.
    """
    rank = transport.rank
    plan = TransferPlan(complete, nodes, need, blobs)
    reads, incoming = plan.reads(rank), plan.receives(rank)
    got = {(step.replica.shard, part): _read(arena, device, step, part) for step in reads for part in _parts(step)}
    sends = [
        (step.target_rank, _tag(step.shard, part), _read(arena, device, step, part))
        for step in plan.sends(rank)
        for part in _parts(step)
    ]
    receives: list[Message] = []
    for step in incoming:
        for part in _parts(step):
            length = step.replica.bulk_bytes if part is Part.BULK else step.replica.blob_bytes
            got[step.shard, part] = receive_buffer(length)
            receives.append((step.source_rank, _tag(step.shard, part), got[step.shard, part]))
    transport.exchange(sends, receives)
    mine: list[Transfer] = [*reads, *incoming]
    sources = Counter(_source(step) for step in mine if Part.BULK in _parts(step))
    return Fetched(
        bulks={shard: data for (shard, part), data in got.items() if part is Part.BULK},
        blobs={shard: bytes(bytes_of(data)) for (shard, part), data in got.items() if part is Part.BLOB},
        received=frozenset(
            step.shard for step in incoming if Part.BLOB in _parts(step) and nodes[step.source_rank] != nodes[rank]
        ),
        moved_bytes=sum(data.numel() for _, _, data in receives),
        sources={name: sources[name] for name in (OWN_ARENA, PEER, *([DEVICE_TIER] if device is not None else []))},
    )


def fill(
    layout: Layout,
    bulks: Mapping[int, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    rank: int,
    *,
    leave: Collection[str] = (),
) -> int:
    """Copy shards into live tensors, in place.

    Args:
        layout: layout of the version.
        bulks: tensor state of each shard.
        tensors: live tensors by name.
        rank: this rank, whose private tensors are filled.
        leave: names of tensors that are not modified.

    Returns:
        Number of bytes copied.
    """
    held = layout.held_by(rank)
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for shard, bulk in bulks.items():
        for piece in pieces_for(layout, shard, rank):
            name = local_name(piece, rank)
            if name not in leave:
                targets.append(part_of(tensors[name], piece, held[name].box.offsets))
                sources.append(slot_view(piece, bulk))
    with torch.no_grad():
        foreach_copy(targets, sources)
    return sum(source.nbytes for source in sources)


def shared_layout(arena: Arena, transport: Transport, digest: str) -> Layout:
    """The layout with a digest, from a rank whose arena contains it. Arenas without it store it.

    Args:
        arena: arena of this node.
        transport: transport between all ranks.
        digest: digest of the layout.

    Raises:
        StateMissingError: no arena contains the layout.
        TransportError: a peer sent invalid data.
    """
    mine = arena.read_layout(digest)
    data = b"" if mine is None else mine.to_bytes()
    lengths = gather_json(transport, len(data))
    if not any(lengths):
        raise StateMissingError(
            f"rank {transport.rank}: no arena contains layout {digest}, which is needed to read its replicas: remove "
            f"them with `ckptless clean`"
        )
    received = broadcast(transport, lengths, data)
    if mine is None:
        try:
            mine = Layout.from_bytes(received, digest)
        except SchemaError as error:
            raise TransportError(f"rank {transport.rank}: a peer sent an invalid layout {digest}: {error}") from error
        arena.write_layout(mine)
    return mine


def _parts(step: Transfer) -> tuple[Part, ...]:
    return (Part.BULK, Part.BLOB) if step.part is Part.WHOLE else (step.part,)


def _read(arena: Arena, device: DeviceTier | None, step: Transfer, part: Part) -> torch.Tensor:
    replica = step.replica
    tier = device if device is not None and replica.tier is Tier.DEVICE else arena
    return tier.read_bulk(replica) if part is Part.BULK else tensor_of(tier.read_blob(replica))


def _source(step: Transfer) -> str:
    if step.replica.tier is Tier.DEVICE:
        return DEVICE_TIER
    return OWN_ARENA if isinstance(step, Read) else PEER


def _tag(shard: int, part: Part) -> int:
    return 2 * shard + (part is Part.BLOB)


def _place_of(replica: Replica) -> tuple[int, int, int]:
    return replica.shard, replica.holder, replica.slot


def _replica(**fields: Any) -> Replica:
    if fields["shard"] >= fields["world_size"]:
        raise refused("shard", f"one of {fields['world_size']}", fields["shard"])
    return Replica(**fields)


def _tier(value: Any, path: str) -> Tier:
    return Tier(one_of(*Tier)(value, path))


_REPLICAS = sequence(record(
    _replica,
    shard=RANK, holder=RANK, node=NODE, slot=integer(0, MOST_SLOTS), version=VERSION, generation=GENERATION,
    world_size=WORLD_SIZE, layout=LAYOUT, state=slot_state, bulk_bytes=BYTES, blob_bytes=BYTES, checksum=CHECKSUM,
    tier=_tier,
))  # fmt: skip
