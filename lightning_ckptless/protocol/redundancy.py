"""The current redundancy of a run: which shards have all their copies, and which losses the copies survive."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from lightning_ckptless.protocol.slots import absent_copies
from lightning_ckptless.protocol.versions import READABLE, Complete, Replica, Snapshot, newest_complete

_MOST_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Protection:
    """How many shards have all their copies.

    Args:
        snapshot: snapshot that was examined; None if no version is complete.
        whole: number of shards with all copies.
        absent: missing copies, as pairs of shard and the rank that should keep it.
        reason: summary, one sentence.
    """

    snapshot: Snapshot | None
    whole: int
    absent: tuple[tuple[int, int], ...]
    reason: str


def protection_of(
    inventory: Collection[Replica], holders: Sequence[Sequence[int]], nodes: Sequence[str], *, since: str = ""
) -> Protection:
    """The redundancy of the newest complete version, or of the one before it if that has more of its copies.

    Slots are overwritten while they are read, so a fully copied version counts even if a newer one is in flight.

    Args:
        inventory: contents of all arenas.
        holders: for each shard the ranks, other than its writer, that should keep a copy.
        nodes: name of each rank's node.
        since: version since which all copies have existed, for the summary.
    """
    shards = len(holders)
    found = newest_complete(replica for replica in inventory if replica.world_size == shards)
    if not isinstance(found, Complete):
        return Protection(None, 0, (), f"0 of {shards} shards have all copies: {found.reason}")
    complete = [found, *_older(inventory, found, shards)]
    best, absent = min(((c, absent_copies(c, holders, nodes)) for c in complete), key=lambda pair: len(pair[1]))
    whole = shards - len({shard for shard, _ in absent})
    version = best.snapshot.version
    if not absent:
        then = f", since {since}" if since else f" of {version}"
        return Protection(best.snapshot, whole, (), f"{shards} of {shards} shards have all copies{then}")
    names = ", ".join(f"shard {shard} on rank {rank}" for shard, rank in absent[:_MOST_SHOWN])
    more = f" and {len(absent) - _MOST_SHOWN} more" if len(absent) > _MOST_SHOWN else ""
    text = f"{whole} of {shards} shards have all copies of {version}; missing: {names}{more}"
    return Protection(best.snapshot, whole, absent, text)


def _older(inventory: Iterable[Replica], found: Complete, shards: int) -> list[Complete]:
    """The complete version before the newest, if it still exists."""
    before = [r for r in inventory if r.snapshot < found.snapshot and r.world_size == shards and r.state in READABLE]
    older = newest_complete(before)
    return [older] if isinstance(older, Complete) else []


@dataclass(frozen=True, slots=True)
class Cover:
    """The losses that a version survives, by the copies that exist of it.

    Args:
        snapshot: the version.
        losses: number of failure domains of which any may be lost at once.
        fatal: sets of domains, one more than that, whose loss destroys every copy of some shard.
    """

    snapshot: Snapshot
    losses: int
    fatal: tuple[tuple[str, ...], ...]


def cover_of(inventory: Collection[Replica], domains: Sequence[str], nodes: Sequence[str]) -> Cover | None:
    """The losses that the newest complete version survives, or the version before it if that survives more of them.

    Slots are overwritten while they are read, so a version with all its copies counts even if a newer one is in flight.

    Args:
        inventory: contents of all arenas.
        domains: failure domain of each rank.
        nodes: name of each rank's node.

    Returns:
        None if no version is complete.
    """
    found = newest_complete(inventory)
    if not isinstance(found, Complete):
        return None
    covers = [_cover(complete, domains, nodes) for complete in (found, *_older(inventory, found, len(found.replicas)))]
    return max(covers, key=lambda cover: (cover.losses, cover.snapshot))


def _cover(complete: Complete, domains: Sequence[str], nodes: Sequence[str]) -> Cover:
    kept = [tuple(sorted({_domain_of(r, domains, nodes) for r in replicas})) for replicas in complete.replicas]
    fewest = min(map(len, kept))
    return Cover(complete.snapshot, fewest - 1, tuple(dict.fromkeys(names for names in kept if len(names) == fewest)))


def _domain_of(replica: Replica, domains: Sequence[str], nodes: Sequence[str]) -> str:
    """The domain with which a replica is lost: that of its holder, or of a rank of its node after a renumbering."""
    if replica.holder < len(nodes) and nodes[replica.holder] == replica.node:
        return domains[replica.holder]
    return next((domain for domain, node in zip(domains, nodes, strict=True) if node == replica.node), replica.node)
