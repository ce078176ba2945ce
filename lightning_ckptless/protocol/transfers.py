"""Which rank reads which shard from its own node's arena, and which rank sends it to which.

A shard in the arena of the rank's own node, or in its own device memory, is read there. Any other shard is sent once by
a rank that can read it: the one with the fewest bytes to send so far, assigned in order of decreasing size. All ranks
compute the same plan from the same inventory, so it also defines the order of sends and receives.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from lightning_ckptless.protocol.versions import Complete, Replica, Tier


class Part(StrEnum):
    """A part of a replica: the tensor state, the host state, or both."""

    BULK = "bulk"
    BLOB = "blob"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Read:
    """A rank reads a replica in its own node's arena.

    Args:
        rank: rank that reads.
        replica: replica to read.
        part: part of the replica.
    """

    rank: int
    replica: Replica
    part: Part


@dataclass(frozen=True, slots=True)
class Send:
    """A rank sends a replica from its own node's arena to a rank of another node.

    Args:
        source_rank: rank that sends.
        target_rank: rank that receives.
        shard: shard of the replica.
        replica: replica to send.
        part: part of the replica.
    """

    source_rank: int
    target_rank: int
    shard: int
    replica: Replica
    part: Part

    @property
    def sent_bytes(self) -> int:
        """Number of bytes sent."""
        return _part_bytes(self.replica, self.part)


Transfer = Read | Send


class _Needed(NamedTuple):
    """The part of a shard that a rank needs."""

    rank: int
    shard: int
    part: Part


def plan_transfers(
    complete: Complete,
    nodes: Sequence[str],
    need: Mapping[int, Collection[int]],
    blobs: Mapping[int, Collection[int]] | None = None,
) -> tuple[Transfer, ...]:
    """Plan how the ranks get the shards they need.

    Args:
        complete: the version, with the intact replicas of each shard.
        nodes: name of each rank's node. Every replica is on the node of some rank, because inventories come from live
            ranks.
        need: for each rank, the shards whose tensor state it needs.
        blobs: for each rank, the shards whose host state it needs; None for its own shard only.

    Returns:
        One transfer for each rank and shard of which it needs a part.
    """
    return _routed(
        complete, nodes, _needed(complete, need, {rank: {rank} for rank in need} if blobs is None else blobs)
    )


def plan_copies(complete: Complete, nodes: Sequence[str], absent: Collection[tuple[int, int]]) -> tuple[Transfer, ...]:
    """Plan how holders get the copies that they lack, tensor state and host state.

    Args:
        complete: the version, with the intact replicas of each shard.
        nodes: name of each rank's node, as for `plan_transfers`.
        absent: pairs of shard and the rank that should have a copy of it.

    Returns:
        One transfer for each pair.
    """
    return _routed(
        complete, nodes, _largest_first(complete, [_Needed(rank, shard, Part.WHOLE) for shard, rank in absent])
    )


def _routed(complete: Complete, nodes: Sequence[str], needed: Sequence[_Needed]) -> tuple[Transfer, ...]:
    ranks_of: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks_of.setdefault(node, []).append(rank)
    sent_bytes = [0] * len(nodes)
    plan: list[Transfer] = []
    for rank, shard, part in needed:
        replicas = complete.replicas[shard]
        local = [replica for replica in replicas if replica.is_readable_by(rank, nodes[rank])]
        if local:
            plan.append(Read(rank, min(local, key=lambda replica: replica.holder != rank), part))
            continue
        offers = [(source, replica) for replica in replicas for source in _readers(replica, ranks_of)]
        assert offers, f"shard {shard} is on {[r.node for r in replicas]}, the ranks are on {sorted(ranks_of)}"
        source, replica = min(offers, key=lambda offer: (sent_bytes[offer[0]], offer[0]))
        send = Send(source, rank, shard, replica, part)
        sent_bytes[source] += send.sent_bytes
        plan.append(send)
    return tuple(plan)


def _readers(replica: Replica, ranks_of: Mapping[str, Sequence[int]]) -> Sequence[int]:
    return (replica.holder,) if replica.tier is Tier.DEVICE else ranks_of.get(replica.node, ())


def _needed(
    complete: Complete, need: Mapping[int, Collection[int]], blobs: Mapping[int, Collection[int]]
) -> list[_Needed]:
    """The part that each rank needs of each shard."""
    parts: dict[tuple[int, int], Part] = {(rank, shard): Part.BULK for rank, shards in need.items() for shard in shards}
    for rank, shards in blobs.items():
        for shard in shards:
            parts[rank, shard] = Part.WHOLE if (rank, shard) in parts else Part.BLOB
    return _largest_first(complete, [_Needed(rank, shard, part) for (rank, shard), part in parts.items()])


def _largest_first(complete: Complete, needed: Sequence[_Needed]) -> list[_Needed]:
    return sorted(needed, key=lambda n: (-_part_bytes(complete.replicas[n.shard][0], n.part), n.shard, n.rank))


def _part_bytes(replica: Replica, part: Part) -> int:
    bulk_bytes = 0 if part is Part.BLOB else replica.bulk_bytes
    blob_bytes = 0 if part is Part.BULK else replica.blob_bytes
    return bulk_bytes + blob_bytes
