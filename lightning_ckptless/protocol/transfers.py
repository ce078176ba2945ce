"""Who reads which shard from its own node's arena, and who sends it to whom.

A shard that lies in the arena of the rank's own node is read there. Any other is sent once by a rank whose node has it:
the one that has been given the fewest bytes so far, the largest shards first. All ranks compute the same plan from the
same inventory, so it is the order of sending and receiving as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.protocol.versions import Complete, Replica


class Part(StrEnum):
    """How much of a replica is wanted: the tensors, the host state behind them, or both."""

    BULK = "bulk"
    BLOB = "blob"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Read:
    """A rank reads a replica in its own node's arena.

    Args:
        rank: who reads.
        replica: what is read.
        part: how much of it.
    """

    rank: int
    replica: Replica
    part: Part


@dataclass(frozen=True, slots=True)
class Send:
    """A rank sends a replica from its own node's arena to a rank of another node.

    Args:
        source_rank: who sends.
        target_rank: who receives.
        shard: shard of the replica.
        replica: what is sent.
        part: how much of it.
    """

    source_rank: int
    target_rank: int
    shard: int
    replica: Replica
    part: Part

    @property
    def sent_bytes(self) -> int:
        """Bytes that travel."""
        return _part_bytes(self.replica, self.part)


Transfer = Read | Send
_Wish = tuple[int, int, Part]
"""A rank, a shard, and what the rank wants of it."""


def plan_transfers(
    complete: Complete,
    nodes: Sequence[str],
    need: Mapping[int, Collection[int]],
    blobs: Mapping[int, Collection[int]] | None = None,
) -> tuple[Transfer, ...]:
    """Plan how the ranks get what they need.

    Args:
        complete: the version, with the good replicas of each shard.
        nodes: name of each rank's node. Every replica lies on the node of some rank: inventories come from live ranks.
        need: for each rank the shards whose tensors it needs.
        blobs: for each rank the shards whose host state it needs; None for that of its own shard.

    Returns:
        One transfer for each rank and shard that it needs anything of.
    """
    return _routed(
        complete, nodes, _wanted(complete, need, {rank: {rank} for rank in need} if blobs is None else blobs)
    )


def plan_copies(complete: Complete, nodes: Sequence[str], absent: Collection[tuple[int, int]]) -> tuple[Transfer, ...]:
    """Plan how holders get copies that they lack, tensors and host state.

    Args:
        complete: the version, with the good replicas of each shard.
        nodes: name of each rank's node, as for `plan_transfers`.
        absent: pairs of shard and rank that is to have a copy of it.

    Returns:
        One transfer for each pair.
    """
    return _routed(complete, nodes, _largest_first(complete, [(rank, shard, Part.WHOLE) for shard, rank in absent]))


def _routed(complete: Complete, nodes: Sequence[str], wanted: Sequence[_Wish]) -> tuple[Transfer, ...]:
    ranks_of: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks_of.setdefault(node, []).append(rank)
    sent_bytes = [0] * len(nodes)
    plan: list[Transfer] = []
    for rank, shard, part in wanted:
        replicas = complete.replicas[shard]
        local = [replica for replica in replicas if replica.node == nodes[rank]]
        if local:
            plan.append(Read(rank, min(local, key=lambda replica: replica.holder != rank), part))
            continue
        offers = [(source, replica) for replica in replicas for source in ranks_of.get(replica.node, ())]
        assert offers, f"shard {shard} lies on {[r.node for r in replicas]}, the ranks are on {sorted(ranks_of)}"
        source, replica = min(offers, key=lambda offer: (sent_bytes[offer[0]], offer[0]))
        send = Send(source, rank, shard, replica, part)
        sent_bytes[source] += send.sent_bytes
        plan.append(send)
    return tuple(plan)


def _wanted(
    complete: Complete, need: Mapping[int, Collection[int]], blobs: Mapping[int, Collection[int]]
) -> list[_Wish]:
    """What each rank wants of each shard."""
    parts: dict[tuple[int, int], Part] = {(rank, shard): Part.BULK for rank, shards in need.items() for shard in shards}
    for rank, shards in blobs.items():
        for shard in shards:
            parts[rank, shard] = Part.WHOLE if (rank, shard) in parts else Part.BLOB
    return _largest_first(complete, [(rank, shard, part) for (rank, shard), part in parts.items()])


def _largest_first(complete: Complete, wanted: Sequence[_Wish]) -> list[_Wish]:
    return sorted(wanted, key=lambda w: (-_part_bytes(complete.replicas[w[1]][0], w[2]), w[1], w[0]))


def _part_bytes(replica: Replica, part: Part) -> int:
    bulk_bytes = 0 if part is Part.BLOB else replica.bulk_bytes
    blob_bytes = 0 if part is Part.BULK else replica.blob_bytes
    return bulk_bytes + blob_bytes
