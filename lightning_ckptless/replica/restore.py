"""From what the arenas hold back to live tensors: choose a version, fetch its shards, fill the tensors in place.

All ranks call these functions together, gather the same facts and compute the same plans from them, so no rank leads.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_ckptless.errors import StateMissingError, TransportError
from lightning_ckptless.formats.schema import SchemaError, integer, record, refused, sequence
from lightning_ckptless.formats.sealed import parse
from lightning_ckptless.internals.torch_internals import foreach_copy
from lightning_ckptless.protocol.transfers import Part, Read, Send, Transfer, plan_transfers
from lightning_ckptless.protocol.versions import Complete, Missing, Replica, newest_complete
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.arena_metadata import NODE
from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.cores import threads_of_a_rank
from lightning_ckptless.replica.layout.layout import Layout, live_views, local_name, pieces_for, slot_views
from lightning_ckptless.replica.slot_stamp import (
    BYTES,
    CHECKSUM,
    GENERATION,
    LAYOUT,
    RANK,
    VERSION,
    WORLD_SIZE,
    slot_state,
)
from lightning_ckptless.replica.transport import Parcel, Transport, room, tensor_of

OWN_ARENA = "own arena"
PEER = "peer"

Need = Mapping[int, Collection[int]]
"""Which shards each rank needs, by rank."""


@dataclass(frozen=True)
class Fetched:
    """A version, brought to this rank.

    Args:
        bulks: tensor part of each needed shard: mapped from the own arena, or received.
        blobs: host state of each rank whose host state was asked for.
        received: whose small states came from peers.
        moved_bytes: bytes received from peers.
        sources: number of shards from the `own arena` and from a `peer`.
    """

    bulks: dict[int, torch.Tensor]
    blobs: dict[int, bytes]
    received: frozenset[int]
    moved_bytes: int
    sources: dict[str, int]


def gather_inventory(arena: Arena, transport: Transport, *, reads: bool) -> tuple[Replica, ...]:
    """What the arenas of all nodes hold.

    Args:
        arena: the own node's arena.
        transport: between all ranks.
        reads: whether this rank speaks for its node: one rank of each does.
    """
    return gather_replicas(arena.inventory() if reads else (), transport)


def gather_replicas(mine: Iterable[Replica], transport: Transport) -> tuple[Replica, ...]:
    """What all ranks have to say, where each names some replicas.

    Args:
        mine: those that this rank names.
        transport: between all ranks.

    Raises:
        TransportError: a peer sent something else.
    """
    everyone = transport.gather(json.dumps([asdict(replica) for replica in mine]).encode())
    try:
        return tuple(replica for line in everyone for replica in _REPLICAS(parse(line), ""))
    except SchemaError as error:
        raise TransportError(f"rank {transport.rank}: a peer sent an inventory that cannot be read: {error}") from error


def choose(arena: Arena, transport: Transport, nodes: Sequence[str], *, need: Need | None = None) -> Complete | Missing:
    """Choose the newest version that is complete and whose bytes are as they were written.

    Only the replicas that would be used are read; where one is damaged, the choice is made again without it. Of what
    another number of ranks has written every shard counts as used.

    Args:
        arena: the own node's arena.
        transport: between all ranks.
        nodes: name of each rank's node.
        need: which shards each rank needs; None for those in which it finds what it holds.

    Raises:
        StateMissingError: no arena has the layout of the version.
    """
    rank = transport.rank
    neighbours = [other for other, node in enumerate(nodes) if node == nodes[rank]]
    inventory = gather_inventory(arena, transport, reads=rank == neighbours[0])
    threads = threads_of_a_rank(len(neighbours), beside_training=False)
    bad: set[Replica] = set()
    good: set[Replica] = set()
    while True:
        found = newest_complete(inventory, bad=bad)
        if isinstance(found, Missing):
            return found
        if is_other := found.snapshot.world_size != len(nodes):
            needed: Need = {rank: range(found.snapshot.world_size) for rank in range(len(nodes))}
        else:
            needed = shared_layout(arena, transport, found.snapshot.layout).need if need is None else need
        plan = plan_transfers(found, nodes, needed, needed if is_other else None)
        used = {step.replica for step in plan} - good
        if not used:
            return found
        here = sorted((replica for replica in used if replica.node == arena.node), key=_place_of)
        mine = here[neighbours.index(rank) :: len(neighbours)]
        bad.update(gather_replicas((replica for replica in mine if not arena.verify(replica, threads)), transport))
        good |= used - bad


def fetch(
    complete: Complete,
    arena: Arena,
    transport: Transport,
    nodes: Sequence[str],
    *,
    need: Need,
    blobs: Need | None = None,
) -> Fetched:
    """Bring the shards of a version, and small states, to every rank that needs them.

    Args:
        complete: what `choose` returned.
        arena: the own node's arena.
        transport: between all ranks.
        nodes: name of each rank's node.
        need: which shards each rank needs, as they were chosen for.
        blobs: the host state of which shards each rank needs; None for that of its own.

    Raises:
        TransportError: a peer is gone.
    """
    rank = transport.rank
    plan = plan_transfers(complete, nodes, need, blobs)
    got = {(step.replica.shard, part): _read(arena, step, part) for step in _reads(plan, rank) for part in _parts(step)}
    local = frozenset(got)
    sends = [
        (step.target_rank, _tag(step.shard, part), _read(arena, step, part))
        for step in _sends(plan)
        if step.source_rank == rank
        for part in _parts(step)
    ]
    receives: list[Parcel] = []
    for step in _sends(plan):
        if step.target_rank == rank:
            for part in _parts(step):
                got[step.shard, part] = room(step.replica.bulk_bytes if part is Part.BULK else step.replica.blob_bytes)
                receives.append((step.source_rank, _tag(step.shard, part), got[step.shard, part]))
    transport.exchange(sends, receives)
    bulks = {shard: data for (shard, part), data in got.items() if part is Part.BULK}
    return Fetched(
        bulks=bulks,
        blobs={shard: bytes(bytes_of(data)) for (shard, part), data in got.items() if part is Part.BLOB},
        received=frozenset(shard for shard, part in got.keys() - local if part is Part.BLOB),
        moved_bytes=sum(data.numel() for _, _, data in receives),
        sources={
            OWN_ARENA: sum(part is Part.BULK for _, part in local),
            PEER: sum(part is Part.BULK for _, part in got.keys() - local),
        },
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
        layout: how the state is cut.
        bulks: tensor part of each shard.
        tensors: live tensors by name.
        rank: this rank: of private tensors it takes its own.
        leave: names of tensors that are left as they are.

    Returns:
        Bytes copied.
    """
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for shard, bulk in bulks.items():
        pieces = pieces_for(layout, shard, rank)
        views = live_views(layout, shard, rank, tensors), slot_views(layout, shard, bulk, rank=rank)
        for piece, target, source in zip(pieces, *views, strict=True):
            if local_name(piece, rank) not in leave:
                targets.append(target)
                sources.append(source)
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
        TransportError: a peer sent something else.
    """
    mine = arena.read_layout(digest)
    having = [rank for rank, said in enumerate(transport.gather(b"1" if mine is not None else b"")) if said]
    if not having:
        raise StateMissingError(
            f"rank {transport.rank}: no arena has layout {digest}, without which its replicas cannot be read: remove "
            f"them with `ckptless clean`"
        )
    if len(having) == transport.world_size:
        assert mine is not None
        return mine
    teller = having[0]
    sent = mine.to_bytes() if mine is not None and transport.rank == teller else b""
    told = transport.gather(sent)[teller]
    if mine is None:
        try:
            mine = Layout.from_bytes(told, digest)
        except SchemaError as error:
            raise TransportError(f"rank {transport.rank}: rank {teller} sent layout {digest}: {error}") from error
        arena.write_layout(mine)
    return mine


def _reads(plan: Sequence[Transfer], rank: int) -> list[Read]:
    return [step for step in plan if isinstance(step, Read) and step.rank == rank]


def _sends(plan: Sequence[Transfer]) -> list[Send]:
    return [step for step in plan if isinstance(step, Send)]


def _parts(step: Transfer) -> tuple[Part, ...]:
    return (Part.BULK, Part.BLOB) if step.part is Part.WHOLE else (step.part,)


def _read(arena: Arena, step: Transfer, part: Part) -> torch.Tensor:
    return arena.read_bulk(step.replica) if part is Part.BULK else tensor_of(arena.read_blob(step.replica))


def _tag(shard: int, part: Part) -> int:
    return 2 * shard + (part is Part.BLOB)


def _place_of(replica: Replica) -> tuple[int, int, int]:
    return replica.shard, replica.holder, replica.slot


def _replica(**fields: Any) -> Replica:
    if fields["shard"] >= fields["world_size"]:
        raise refused("shard", f"one of {fields['world_size']}", fields["shard"])
    return Replica(**fields)


_REPLICAS = sequence(record(
    _replica,
    shard=RANK, holder=RANK, node=NODE, slot=integer(0, 1), version=VERSION, generation=GENERATION,
    world_size=WORLD_SIZE, layout=LAYOUT, state=slot_state, bulk_bytes=BYTES, blob_bytes=BYTES, checksum=CHECKSUM,
))  # fmt: skip
