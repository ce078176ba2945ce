"""Which version of the state can be restored, decided from the contents of the arenas.

A *version* is the state after one optimizer step. It exists at two moments of a step: before the validation phase
(validation, plateau schedulers) and after it. A version is complete if every shard of it has at least one intact
replica, all written in the same generation for the same world size and layout, and its replicas agree. The newest
complete version is restored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.protocol.wording import counted


@dataclass(frozen=True, order=True, slots=True)
class Version:
    """The state after an optimizer step.

    Args:
        optimizer_step: Lightning's `global_step` after the step; 0 before the first.
        validation_done: whether the validation phase after the step is part of the version.
    """

    optimizer_step: int
    validation_done: bool

    def __str__(self) -> str:
        return (
            f"step {self.optimizer_step}" if self.validation_done else f"step {self.optimizer_step} (before validation)"
        )


class SlotState(StrEnum):
    """The state of a slot."""

    EMPTY = "empty"
    WRITING = "writing"
    STAGED = "staged"
    COMMITTED = "committed"


READABLE = frozenset({SlotState.STAGED, SlotState.COMMITTED})


class Tier(StrEnum):
    """Where a replica is stored, which decides what it survives and who can read it."""

    HOST = "host"
    """In an arena: outlives the processes of its node, and every rank of the node reads it."""
    DEVICE = "device"
    """In the device memory of a rank: ends with its process, and only this rank reads it."""


@dataclass(frozen=True, slots=True)
class Replica:
    """An entry of an inventory: a slot that contains a copy of a shard.

    Args:
        shard: index of the shard, 0 to `world_size - 1`; equal to the rank that wrote it.
        holder: rank that keeps this copy; equal to `shard` for the writer's own copy.
        node: name of the node whose arena contains the slot.
        slot: index of the slot in its ring.
        version: version of the copy.
        generation: generation that wrote it.
        world_size: number of shards of the version.
        layout: digest of the layout with which it was written.
        state: state of the slot according to its header.
        bulk_bytes: length of the tensor state.
        blob_bytes: length of the host state.
        checksum: digest of both parts, hexadecimal; empty if checksums are off.
        tier: where the copy is stored.
    """

    shard: int
    holder: int
    node: str
    slot: int
    version: Version
    generation: int
    world_size: int
    layout: str
    state: SlotState
    bulk_bytes: int
    blob_bytes: int
    checksum: str
    tier: Tier = Tier.HOST

    def is_readable_by(self, rank: int, node: str) -> bool:
        """Whether a rank of a node can read it without another rank's help."""
        return self.holder == rank if self.tier is Tier.DEVICE else self.node == node

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot that this replica is a part of."""
        return Snapshot(self.version, self.generation, self.world_size, self.layout)


@dataclass(frozen=True, order=True, slots=True)
class Snapshot:
    """What replicas must have in common to be combined. Newer snapshots compare greater."""

    version: Version
    generation: int
    world_size: int
    layout: str


@dataclass(frozen=True, slots=True)
class Complete:
    """A version that can be restored, with the intact replicas of each shard."""

    snapshot: Snapshot
    replicas: tuple[tuple[Replica, ...], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Missing:
    """No version is complete.

    Args:
        shards: shards without an intact replica of the newest version found.
        since: newest version found; None if the arenas are empty.
        reason: explanation, one sentence.
    """

    shards: tuple[int, ...]
    since: Version | None
    reason: str


def newest_complete(inventory: Iterable[Replica], *, bad: Collection[Replica] = ()) -> Complete | Missing:
    """Choose the newest version of which every shard has a readable replica.

    All ranks make the same choice from the same inventory, so no leader is needed.

    Args:
        inventory: contents of all live arenas.
        bad: replicas whose data did not match the checksum.
    """
    by_snapshot: dict[Snapshot, list[Replica]] = defaultdict(list)
    for replica in inventory:
        if replica.state in READABLE and replica not in bad:
            by_snapshot[replica.snapshot].append(replica)
    if not by_snapshot:
        return Missing((), None, _nothing_readable(len(bad)))
    for snapshot in sorted(by_snapshot, reverse=True):
        shards = _by_shard(snapshot, by_snapshot[snapshot])
        if all(shards) and not any(map(_disagree, shards)):
            return Complete(snapshot, shards, _found(snapshot, shards, bad))
    newest = max(by_snapshot)
    absent = tuple(s for s, kept in enumerate(_by_shard(newest, by_snapshot[newest])) if not kept)
    if not absent:
        return Missing((), newest.version, f"no version is complete: replicas of {newest.version} differ")
    return Missing(absent, newest.version, _lost(newest, absent, len(bad)))


def complete_versions(inventory: Iterable[Replica], *, world_size: int, layout: str) -> list[Version]:
    """All versions of which every shard has a readable replica, in ascending order.

    Args:
        inventory: contents of all live arenas.
        world_size: consider only versions of this many shards.
        layout: consider only versions written with this layout.
    """
    by_snapshot: dict[Snapshot, set[int]] = defaultdict(set)
    for replica in inventory:
        if replica.state in READABLE and (replica.world_size, replica.layout) == (world_size, layout):
            by_snapshot[replica.snapshot].add(replica.shard)
    return sorted({snapshot.version for snapshot, shards in by_snapshot.items() if len(shards) == world_size})


def _by_shard(snapshot: Snapshot, replicas: Iterable[Replica]) -> tuple[tuple[Replica, ...], ...]:
    kept: list[list[Replica]] = [[] for _ in range(snapshot.world_size)]
    for replica in replicas:
        kept[replica.shard].append(replica)
    return tuple(tuple(sorted(k, key=lambda r: (r.holder != r.shard, r.holder, r.node, r.slot))) for k in kept)


def _disagree(replicas: Iterable[Replica]) -> bool:
    """Whether intact replicas of a shard differ: their writers died before the vote that would have discarded them."""
    return len({replica.checksum for replica in replicas if replica.checksum}) > 1


def _found(snapshot: Snapshot, shards: tuple[tuple[Replica, ...], ...], bad: Collection[Replica]) -> str:
    fewest = min(len(kept) for kept in shards)
    damaged = f"; {counted(len(bad), 'damaged replica')} ignored" if bad else ""
    return (
        f"{snapshot.version} of generation {snapshot.generation} is complete: {snapshot.world_size} of "
        f"{snapshot.world_size} shards, at least {counted(fewest, 'replica')} each{damaged}"
    )


def _lost(newest: Snapshot, absent: tuple[int, ...], bad_count: int) -> str:
    names = ", ".join(str(s) for s in absent)
    shards, have = ("shard", "has") if len(absent) == 1 else ("shards", "have")
    damaged = f" ({counted(bad_count, 'damaged replica')} ignored)" if bad_count else ""
    return (
        f"no version is complete: {shards} {names} of {newest.world_size} {have} no replica of "
        f"{newest.version}{damaged}"
    )


def _nothing_readable(bad_count: int) -> str:
    return f"the arenas contain no readable replica ({bad_count} damaged)" if bad_count else "the arenas are empty"
