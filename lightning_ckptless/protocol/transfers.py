"""Which rank reads which shard from its own node's arena, and which rank sends it to which.

A shard in the arena of the rank's own node, or in its own device memory, is read there. Any other shard is sent once by
a rank that can read it: any rank of the arena's node, but only the holder of what is in device memory. All ranks decide
from the same inventory.

Every rank may need every shard, so the transfers of a restore grow with the square of the number of ranks. A rank
computes only those that it takes part in: who sends follows from the shard and the receiver alone, in turn over the
ranks that have the shard. The few copies that are filled in after a restore are planned as a whole: each is sent by the
rank with the fewest bytes to send so far, assigned in order of decreasing size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from lightning_ckptless.protocol.versions import Complete, Replica, Tier


class Part(StrEnum):
    """A part of a replica: the tensor state, the host state, or both."""

    BULK = "bulk"
    BLOB = "blob"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Read:
    """A rank reads a replica in its own node's arena, or in its own device memory.

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
    """A rank sends a replica that it can read to a rank that cannot.

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


class TransferPlan:
    """How the ranks get the shards they need: one transfer for each rank and shard of which it needs a part.

    Args:
        complete: the version, with the intact replicas of each shard.
        nodes: name of each rank's node. Every replica is on the node of some rank, because inventories come from live
            ranks.
        need: for each rank, the shards whose tensor state it needs.
        blobs: for each rank, the shards whose host state it needs; None for its own shard only.
    """

    def __init__(
        self,
        complete: Complete,
        nodes: Sequence[str],
        need: Mapping[int, Collection[int]],
        blobs: Mapping[int, Collection[int]] | None = None,
    ) -> None:
        self._complete = complete
        self._nodes = nodes
        self._ranks_of = _ranks_by_node(nodes)
        self._need = _quick_to_search(need)
        self._blobs = None if blobs is None else _quick_to_search(blobs)

    def reads(self, rank: int) -> list[Read]:
        """The transfers of a rank from its own node's arena, and from its own device memory."""
        return [
            Read(rank, _nearest(local, rank), part)
            for shard, part in self._needed(rank)
            if (local := self._local(shard, rank))
        ]

    def receives(self, rank: int) -> list[Send]:
        """The transfers that a rank receives."""
        return [self._send(rank, shard, part) for shard, part in self._needed(rank) if not self._local(shard, rank)]

    def sends(self, rank: int) -> list[Send]:
        """The transfers that a rank sends."""
        found: list[Send] = []
        for shard in self._shards_of_node.get(self._nodes[rank], ()):
            offers = self._offers(shard)
            if rank not in offers:
                continue  # It is in the device memory of another rank of the node.
            first = (list(offers).index(rank) - shard // 2) % len(offers)
            for target in range(first, len(self._nodes), len(offers)):
                part = self._part(target, shard)
                if part is not None and not self._local(shard, target):
                    found.append(Send(rank, target, shard, offers[rank], part))
        return found

    def used_on(self, node: str) -> set[Replica]:
        """The replicas in a node's arena that ranks read or send."""
        used: set[Replica] = set()
        for rank in self._ranks_of[node]:
            used.update(step.replica for step in self.reads(rank))
            used.update(step.replica for step in self.sends(rank))
        return {replica for replica in used if replica.tier is Tier.HOST}

    @cached_property
    def _shards_of_node(self) -> dict[str, list[int]]:
        shards: dict[str, list[int]] = {}
        for shard, replicas in enumerate(self._complete.replicas):
            for node in {replica.node for replica in replicas}:
                shards.setdefault(node, []).append(shard)
        return shards

    def _local(self, shard: int, rank: int) -> list[Replica]:
        return _readable_by(rank, self._nodes[rank], self._complete.replicas[shard])

    def _offers(self, shard: int) -> dict[int, Replica]:
        return _offers(shard, self._complete.replicas[shard], self._ranks_of)

    def _send(self, target: int, shard: int, part: Part) -> Send:
        offers = self._offers(shard)
        # In turn by receiver and by shard: for many receivers of a shard, for many shards of a receiver, and if each
        # rank receives its own shard only.
        source = [*offers][(target + shard // 2) % len(offers)]
        return Send(source, target, shard, offers[source], part)

    def _needed(self, rank: int) -> Iterator[tuple[int, Part]]:
        """The shards of which a rank needs a part, and that part."""
        if rank in self._need or (self._blobs is not None and rank in self._blobs):
            bulks = self._need.get(rank, ())
            blobs = (rank,) if self._blobs is None else self._blobs.get(rank, ())
            for shard in sorted({*bulks, *blobs}):
                part = self._part(rank, shard)
                assert part is not None
                yield shard, part

    def _part(self, rank: int, shard: int) -> Part | None:
        """The part that a rank needs of a shard."""
        needs_bulk = shard in self._need.get(rank, ())
        needs_blob = rank == shard and rank in self._need if self._blobs is None else shard in self._blobs.get(rank, ())
        if needs_bulk:
            return Part.WHOLE if needs_blob else Part.BULK
        return Part.BLOB if needs_blob else None


def plan_copies(complete: Complete, nodes: Sequence[str], absent: Collection[tuple[int, int]]) -> tuple[Transfer, ...]:
    """Plan how holders get the copies that they lack, tensor state and host state.

    Args:
        complete: the version, with the intact replicas of each shard.
        nodes: name of each rank's node, as for `TransferPlan`.
        absent: pairs of shard and the rank that should have a copy of it.

    Returns:
        One transfer for each pair.
    """
    ranks_of = _ranks_by_node(nodes)
    sent_bytes = [0] * len(nodes)
    plan: list[Transfer] = []
    for shard, rank in sorted(absent, key=lambda pair: (-_whole_bytes(complete.replicas[pair[0]][0]), *pair)):
        replicas = complete.replicas[shard]
        if local := _readable_by(rank, nodes[rank], replicas):
            plan.append(Read(rank, _nearest(local, rank), Part.WHOLE))
            continue
        offers = _offers(shard, replicas, ranks_of)
        source = min(offers, key=lambda offer: (sent_bytes[offer], offer))
        sent_bytes[source] += _whole_bytes(offers[source])
        plan.append(Send(source, rank, shard, offers[source], Part.WHOLE))
    return tuple(plan)


def _ranks_by_node(nodes: Sequence[str]) -> dict[str, list[int]]:
    ranks: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks.setdefault(node, []).append(rank)
    return ranks


def _readable_by(rank: int, node: str, replicas: Sequence[Replica]) -> list[Replica]:
    return [replica for replica in replicas if replica.is_readable_by(rank, node)]


def _nearest(local: Sequence[Replica], rank: int) -> Replica:
    """Of the replicas that a rank can read, the one that it keeps itself, if there is one."""
    return min(local, key=lambda replica: replica.holder != rank)


def _offers(shard: int, replicas: Sequence[Replica], ranks_of: Mapping[str, Sequence[int]]) -> dict[int, Replica]:
    """The ranks that can send a shard, ascending, and what each would send."""
    offers = {source: replica for replica in reversed(replicas) for source in _readers(replica, ranks_of)}
    assert offers, f"shard {shard} is on {[r.node for r in replicas]}, the ranks are on {sorted(ranks_of)}"
    return dict(sorted(offers.items()))


def _readers(replica: Replica, ranks_of: Mapping[str, Sequence[int]]) -> Sequence[int]:
    return (replica.holder,) if replica.tier is Tier.DEVICE else ranks_of.get(replica.node, ())


def _quick_to_search(need: Mapping[int, Collection[int]]) -> dict[int, Collection[int]]:
    """The same needs as sets; ranks that share one collection share its set."""
    sets: dict[int, Collection[int]] = {}
    for shards in need.values():
        if id(shards) not in sets:
            sets[id(shards)] = shards if isinstance(shards, range) else frozenset(shards)
    return {rank: sets[id(shards)] for rank, shards in need.items()}


def _whole_bytes(replica: Replica) -> int:
    return _part_bytes(replica, Part.WHOLE)


def _part_bytes(replica: Replica, part: Part) -> int:
    bulk_bytes = 0 if part is Part.BLOB else replica.bulk_bytes
    blob_bytes = 0 if part is Part.BULK else replica.blob_bytes
    return bulk_bytes + blob_bytes
