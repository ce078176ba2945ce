"""Which version of the state can be restored: a pure reading of what the arenas hold.

A *version* is the state after one optimizer step. It exists at two moments of a step: before its tail (validation,
plateau schedulers) and after it. A version is complete when every shard of it has at least one good replica, all
written in the same generation for the same world size and layout. The newest complete one is restored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, order=True, slots=True)
class Version:
    """The state after an optimizer step.

    Args:
        optimizer_step: Lightning's `global_step` after the step; 0 before the first.
        validation_done: whether validation and the other work behind the step is part of it.
    """

    optimizer_step: int
    validation_done: bool

    def __str__(self) -> str:
        return (
            f"step {self.optimizer_step}" if self.validation_done else f"step {self.optimizer_step} (before its tail)"
        )


class SlotState(StrEnum):
    """What a slot holds."""

    EMPTY = "empty"
    WRITING = "writing"
    STAGED = "staged"
    COMMITTED = "committed"


READABLE = frozenset({SlotState.STAGED, SlotState.COMMITTED})


@dataclass(frozen=True, slots=True)
class Replica:
    """One line of an inventory: a slot that holds a copy of a shard.

    Args:
        shard: index of the shard, 0 to `world_size - 1`; equal to the rank that wrote it.
        holder: rank that keeps this copy; equal to `shard` for the writer's own one.
        node: name of the arena that holds the slot.
        slot: 0 or 1.
        version: the version of the copy.
        generation: number of the membership that wrote it.
        world_size: number of shards of the version.
        layout: digest of the layout it was written with.
        state: what the slot's header says.
        bulk_bytes: length of the tensor part.
        blob_bytes: length of the host state behind it.
        checksum: digest of both parts, hexadecimal; empty when checksums are off.
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

    @property
    def snapshot(self) -> Snapshot:
        """The state this replica is a part of."""
        return Snapshot(self.version, self.generation, self.world_size, self.layout)


@dataclass(frozen=True, order=True, slots=True)
class Snapshot:
    """What replicas must have in common to be put together: newer ones compare greater."""

    version: Version
    generation: int
    world_size: int
    layout: str


@dataclass(frozen=True, slots=True)
class Complete:
    """A version that can be restored, with the good replicas of each shard."""

    snapshot: Snapshot
    replicas: tuple[tuple[Replica, ...], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Missing:
    """No version is complete.

    Args:
        shards: shards without a good replica of the newest version that was seen.
        since: newest version that was seen; None when the arenas are empty.
        reason: the finding in a sentence.
    """

    shards: tuple[int, ...]
    since: Version | None
    reason: str


def newest_complete(inventory: Iterable[Replica], *, bad: Collection[Replica] = ()) -> Complete | Missing:
    """Choose the newest version of which every shard has a readable replica.

    Every rank computes the same from the same inventory, so no leader is needed.

    Args:
        inventory: what all live arenas hold.
        bad: replicas whose bytes did not match their checksum.
    """
    by_snapshot: dict[Snapshot, list[Replica]] = defaultdict(list)
    for replica in inventory:
        if replica.state in READABLE and replica not in bad:
            by_snapshot[replica.snapshot].append(replica)
    if not by_snapshot:
        return Missing((), None, _nothing_readable(len(bad)))
    for snapshot in sorted(by_snapshot, reverse=True):
        shards = _by_shard(snapshot, by_snapshot[snapshot])
        if all(shards):
            return Complete(snapshot, shards, _found(snapshot, shards, bad))
    newest = max(by_snapshot)
    absent = tuple(s for s, kept in enumerate(_by_shard(newest, by_snapshot[newest])) if not kept)
    return Missing(absent, newest.version, _lost(newest, absent, len(bad)))


def _by_shard(snapshot: Snapshot, replicas: Iterable[Replica]) -> tuple[tuple[Replica, ...], ...]:
    kept: list[list[Replica]] = [[] for _ in range(snapshot.world_size)]
    for replica in replicas:
        kept[replica.shard].append(replica)
    return tuple(tuple(sorted(k, key=lambda r: (r.holder != r.shard, r.holder, r.node, r.slot))) for k in kept)


def _found(snapshot: Snapshot, shards: tuple[tuple[Replica, ...], ...], bad: Collection[Replica]) -> str:
    fewest = min(len(kept) for kept in shards)
    damaged = f"; {len(bad)} damaged replicas left aside" if bad else ""
    return (
        f"{snapshot.version} of generation {snapshot.generation} is complete: {snapshot.world_size} of "
        f"{snapshot.world_size} shards, at least {fewest} replicas each{damaged}"
    )


def _lost(newest: Snapshot, absent: tuple[int, ...], bad_count: int) -> str:
    names = ", ".join(str(s) for s in absent)
    damaged = f" ({bad_count} damaged replicas left aside)" if bad_count else ""
    return f"no version is complete: of {newest.version} shards {names} of {newest.world_size} have no replica{damaged}"


def _nothing_readable(bad_count: int) -> str:
    return f"the arenas hold no readable replica ({bad_count} damaged)" if bad_count else "the arenas are empty"
