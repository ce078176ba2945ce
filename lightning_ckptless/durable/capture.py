"""Copies a consistent version out of the arenas of a running job.

A slot is valid from the commit of its version until the second version after it is begun. Training does not wait for
readers, so a slot may be overwritten while it is read. This is detected: `begin` changes the header of a slot before
its first byte, so a copy is consistent if the header is the same before and after it. The checksum is verified as well.
If the version was overwritten, the copy is repeated with the newest one.

A slot is first copied into memory, which is as fast as mirroring, since it is valid for about one step only. The disk,
which may take many steps, is written from this copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from lightning_ckptless.durable.recipe import read_recipe
from lightning_ckptless.errors import ArenaError, DurableError
from lightning_ckptless.protocol.versions import (
    Complete,
    Missing,
    Replica,
    SlotState,
    Snapshot,
    Version,
    newest_complete,
)
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.checksum import bytes_of, digest, matches
from lightning_ckptless.replica.layout.layout import Layout

TRIES = 50
_OWN_CHECKSUM = "xxh3"


class OverwrittenError(DurableError):
    """The version was overwritten while it was read."""


@dataclass(frozen=True)
class ShardCopy:
    """A copy of one shard of a version.

    Args:
        bulk: tensor state, uint8 of shape [bulk bytes].
        blob: host state of its rank.
        checksum: digest of both.
    """

    bulk: torch.Tensor
    blob: bytes
    checksum: str


@dataclass(frozen=True)
class Captured:
    """A version that was copied out of the arenas or read from disk.

    Args:
        snapshot: version, generation, world size and layout digest.
        layout: layout of the shards.
        shards: copies of the shards, one per rank.
        recipe: sealed recipe for a Lightning checkpoint; empty if the run has none.
        tries: number of attempts that the copy took.
    """

    snapshot: Snapshot
    layout: Layout
    shards: tuple[ShardCopy, ...]
    recipe: bytes
    tries: int = 1


class CopyBuffers:
    """Buffers that are reused between copies, as the first touch of a page takes longer than the copy into it."""

    def __init__(self) -> None:
        self._by_shard: dict[int, torch.Tensor] = {}

    def of(self, shard: int, length_bytes: int) -> torch.Tensor:
        """Return a buffer for the tensor state of a shard."""
        buffer = self._by_shard.get(shard)
        if buffer is None or buffer.numel() != length_bytes:
            buffer = self._by_shard[shard] = torch.empty(length_bytes, dtype=torch.uint8)
        return buffer


def newest_committed(arenas: Sequence[Arena], *, at: Version | None = None) -> Complete | Missing:
    """Return the newest version with all shards in the arenas and at least one committed slot.

    A version counts as missing if no slot changed between two inventories, or after `TRIES` of them.

    Args:
        arenas: all arenas that can be read on this node.
        at: consider only this version; None for all.
    """
    inventory = _inventory(arenas)
    for _ in range(TRIES):
        found = _newest_in(inventory, at)
        if isinstance(found, Complete):
            return found
        previous, inventory = inventory, _inventory(arenas)
        if inventory == previous:
            return found
    return _newest_in(inventory, at)


def _newest_in(inventory: Sequence[Replica], at: Version | None) -> Complete | Missing:
    committed = {replica.snapshot for replica in inventory if replica.state is SlotState.COMMITTED}
    return newest_complete(r for r in inventory if r.snapshot in committed and at in (None, r.version))


def _inventory(arenas: Sequence[Arena]) -> list[Replica]:
    """Read all slot headers. They are not read atomically, so together they may never have existed at one time."""
    return [replica for arena in arenas for replica in arena.inventory()]


def capture(arenas: Sequence[Arena], buffers: CopyBuffers, *, at: Version | None = None, threads: int = 1) -> Captured:
    """Copy the newest committed version.

    Args:
        arenas: all arenas that can be read on this node.
        buffers: buffers to copy into.
        at: copy only this version; None for the newest.
        threads: number of shards to copy in parallel.

    Raises:
        DurableError: there is no complete version, it is damaged, or training overwrote it in every attempt.
    """
    by_node = {arena.node: arena for arena in arenas}
    for number in range(1, TRIES + 1):
        found = newest_committed(arenas, at=at)
        if isinstance(found, Missing):
            raise DurableError(_absent(found, arenas, at))
        try:
            with ThreadPoolExecutor(threads, thread_name_prefix="ckptless-capture") as pool:
                shards = tuple(pool.map(lambda kept: copy_shard(by_node, kept, buffers), found.replicas))
            layout = _layout(arenas, found)
        except OverwrittenError:
            continue
        return Captured(found.snapshot, layout, shards, _recipe(arenas), number)
    raise DurableError(
        f"training overwrote the version in each of {TRIES} attempts to copy it: a version is kept for about one step; "
        "increase mirror_every_n_steps"
    )


def _absent(found: Missing, arenas: Sequence[Arena], at: Version | None) -> str:
    available = newest_committed(arenas)
    if at is not None and not isinstance(available, Missing):
        return f"{at} is not in the arenas (any more), which hold {available.snapshot.version}"
    return found.reason


def _layout(arenas: Sequence[Arena], found: Complete) -> Layout:
    known = (arena.read_layout(found.snapshot.layout) for arena in arenas)
    layout = next((layout for layout in known if layout is not None), None)
    if layout is None:
        # A layout is written before its first version and removed after its last.
        raise OverwrittenError(f"the layout of {found.snapshot.version} no longer exists")
    return layout


def _recipe(arenas: Sequence[Arena]) -> bytes:
    return next((recipe for arena in arenas if (recipe := read_recipe(arena.path))), b"")


def copy_shard(by_node: dict[str, Arena], kept: Iterable[Replica], buffers: CopyBuffers) -> ShardCopy:
    """Copy a shard from its first intact replica.

    Raises:
        OverwrittenError: all replicas were overwritten.
        DurableError: all remaining replicas fail their checksums.
    """
    damaged = []
    for replica in kept:
        arena = by_node[replica.node]
        try:
            target = buffers.of(replica.shard, replica.bulk_bytes)
            target.copy_(arena.read_bulk(replica))
            blob = arena.read_blob(replica)
        except ArenaError:
            continue
        if not _is_unchanged(arena, replica):
            continue
        if matches(replica.checksum, (bytes_of(target), blob)):
            return ShardCopy(target, blob, replica.checksum or digest(_OWN_CHECKSUM, (bytes_of(target), blob)))
        damaged.append(str(arena.path))
    if damaged:
        raise DurableError(f"all replicas of a shard are damaged, in {', '.join(damaged)}")
    raise OverwrittenError("overwritten while being read")


def _is_unchanged(arena: Arena, replica: Replica) -> bool:
    """Return whether the slot has not been overwritten since its header was read; it may have been committed."""
    return any(replace(now, state=replica.state) == replica for now in arena.inventory())
