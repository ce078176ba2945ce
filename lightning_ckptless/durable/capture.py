"""A version copied out of the arenas of a run that goes on meanwhile, whole or not at all.

A slot lives from the commit of its version until the second version after it is begun. Nobody waits for a reader, so a
slot may be overwritten while it is read. That is seen: `begin` changes a slot's header before the first byte, so bytes
were whole if the header is the same after they were copied as it was before. Then the checksum is compared as well, and
where a version was overwritten the copy is tried again with the newest one.

A slot is copied into memory first, at the speed of the copy that filled it, for its life is about one step. The disk,
which may take longer than many steps, is written from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

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
    """One shard of a version.

    Args:
        bulk: its tensor part: uint8 of shape [bulk bytes].
        blob: the host state of its rank.
        checksum: digest of both.
    """

    bulk: torch.Tensor
    blob: bytes
    checksum: str


@dataclass(frozen=True)
class Captured:
    """A version outside of the arenas.

    Args:
        snapshot: which one.
        layout: how it is cut.
        shards: one per rank.
        recipe: how a Lightning checkpoint is put together from it; empty where the run has left none.
        tries: how often it was tried to copy it out of arenas.
    """

    snapshot: Snapshot
    layout: Layout
    shards: tuple[ShardCopy, ...]
    recipe: bytes
    tries: int = 1


class Room:
    """Memory that is kept from one copy to the next: the first touch of a page takes longer than the copy into it."""

    def __init__(self) -> None:
        self._of: dict[int, torch.Tensor] = {}

    def of(self, shard: int, length_bytes: int) -> torch.Tensor:
        """Room for the tensor part of a shard."""
        held = self._of.get(shard)
        if held is None or held.numel() != length_bytes:
            held = self._of[shard] = torch.empty(length_bytes, dtype=torch.uint8)
        return held


def newest_committed(arenas: Sequence[Arena], *, at: Version | None = None) -> Complete | Missing:
    """The newest version of which the arenas have every shard, and some header says that all ranks have it.

    A version counts as missing when no slot has changed between two readings, or after `TRIES` of them.

    Args:
        arenas: of all nodes, as far as they can be read here.
        at: look for this version alone.
    """
    held = _inventory(arenas)
    for _ in range(TRIES):
        found = _newest_in(held, at)
        if isinstance(found, Complete):
            return found
        before, held = held, _inventory(arenas)
        if held == before:
            return found
    return _newest_in(held, at)


def _newest_in(held: Sequence[Replica], at: Version | None) -> Complete | Missing:
    agreed = {replica.snapshot for replica in held if replica.state is SlotState.COMMITTED}
    return newest_complete(r for r in held if r.snapshot in agreed and at in (None, r.version))


def _inventory(arenas: Sequence[Arena]) -> list[Replica]:
    """Slot by slot: while training overwrites them, what is read is no state that the arenas were ever in."""
    return [replica for arena in arenas for replica in arena.inventory()]


def capture(arenas: Sequence[Arena], room: Room, *, at: Version | None = None, threads: int = 1) -> Captured:
    """Copy the newest committed version.

    Args:
        arenas: of all nodes, as far as they can be read here.
        room: where to.
        at: copy this version alone.
        threads: shards that are copied at a time.

    Raises:
        DurableError: there is no complete version, its bytes are damaged, or training was faster each time.
    """
    by_node = {arena.node: arena for arena in arenas}
    for number in range(1, TRIES + 1):
        found = newest_committed(arenas, at=at)
        if isinstance(found, Missing):
            raise DurableError(_absent(found, arenas, at))
        try:
            with ThreadPoolExecutor(threads, thread_name_prefix="ckptless-capture") as pool:
                shards = tuple(pool.map(lambda kept: copy_shard(by_node, kept, room), found.replicas))
            layout = _layout(arenas, found)
        except OverwrittenError:
            continue
        return Captured(found.snapshot, layout, shards, _recipe(arenas), number)
    raise DurableError(
        f"training has overwritten each of {TRIES} versions while it was copied: a version lives for about a step; "
        "set mirror_every_n_steps to a larger number"
    )


def _absent(found: Missing, arenas: Sequence[Arena], at: Version | None) -> str:
    there = newest_committed(arenas)
    if at is not None and not isinstance(there, Missing):
        return f"{at} is not in the arenas (any more); they hold {there.snapshot.version}"
    return found.reason


def _layout(arenas: Sequence[Arena], found: Complete) -> Layout:
    known = (arena.read_layout(found.snapshot.layout) for arena in arenas)
    layout = next((layout for layout in known if layout is not None), None)
    if layout is None:
        # Written before the first version that needs it, and dropped when no version does any more.
        raise OverwrittenError(f"the layout of {found.snapshot.version} is gone")
    return layout


def _recipe(arenas: Sequence[Arena]) -> bytes:
    return next((recipe for arena in arenas if (recipe := read_recipe(arena.path))), b"")


def copy_shard(by_node: dict[str, Arena], kept: Iterable[Replica], room: Room) -> ShardCopy:
    """Copy a shard from the first of its replicas that is as it was written.

    Raises:
        OverwrittenError: none of them is the version any more.
        DurableError: the bytes of those that are do not match their checksums.
    """
    damaged = []
    for replica in kept:
        arena = by_node[replica.node]
        try:
            target = room.of(replica.shard, replica.bulk_bytes)
            target.copy_(arena.read_bulk(replica))
            blob = arena.read_blob(replica)
        except ArenaError:
            continue
        if not _still_there(arena, replica):
            continue
        if matches(replica.checksum, (bytes_of(target), blob)):
            return ShardCopy(target, blob, replica.checksum or digest(_OWN_CHECKSUM, (bytes_of(target), blob)))
        damaged.append(str(arena.path))
    if damaged:
        raise DurableError(f"every replica of a shard is damaged, in {', '.join(damaged)}")
    raise OverwrittenError("overwritten while it was read")


def _still_there(arena: Arena, replica: Replica) -> bool:
    """Whether the slot has not been begun anew since its header was read; it may have been committed."""
    return any(replace(now, state=replica.state) == replica for now in arena.inventory())


def attach_all(paths: Iterable[Path]) -> list[Arena]:
    """Arenas for reading.

    Raises:
        ArenaError: one of them is gone.
    """
    return [Arena.attach(path) for path in paths]
