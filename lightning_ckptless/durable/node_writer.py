"""The durable writer of one of several nodes, none of which has all shards.

It writes the shards of its own ranks for every version that is due on all nodes: after validation, with a step that is
a multiple of the interval. The writer of the first node completes the states.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_ckptless.durable.capture import CopyBuffers, OverwrittenError, ShardCopy, copy_shard
from lightning_ckptless.durable.folder import DurableFolder, Manifest, write_manifest
from lightning_ckptless.durable.parts import Parts, remove_parts_up_to
from lightning_ckptless.durable.recipe import read_recipe
from lightning_ckptless.durable.store import finish_state, require_space
from lightning_ckptless.durable.writer_settings import WriterSettings
from lightning_ckptless.errors import DurableError
from lightning_ckptless.ledger import Ledger
from lightning_ckptless.protocol.durable_schedule import Share, states_to_drop
from lightning_ckptless.protocol.versions import READABLE, Replica, SlotState, Snapshot, Version
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.layout.layout import Layout

PARTS_WAIT_S = 60.0
"""Seconds to wait for the parts of all nodes before a state is discarded."""
POLL_EVERY_S = 0.05

Failed = Callable[[Version, Exception], None]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A state that waits for the parts of other nodes.

    Args:
        parts: parts of all nodes.
        layout: layout of the state.
        recipe: sealed recipe for a Lightning checkpoint.
        began_at: time at which this node began its own part, on the monotonic clock.
        copied_s: seconds to copy its shards out of the arena.
    """

    parts: Parts
    layout: Layout
    recipe: bytes
    began_at: float
    copied_s: float


class NodeWriter:
    """Writes a node's part of the durable states of a run.

    Args:
        settings: settings of the writer.
        failed: called with the version of a state that could not be written, and the error.
    """

    def __init__(self, settings: WriterSettings, failed: Failed) -> None:
        self._settings = settings
        self._failed = failed
        self._folder = DurableFolder(Path(settings.folder))
        self._ledger = Ledger(settings.ledger)
        self._buffers = CopyBuffers()
        self._last: tuple[int, Version] | None = None
        self._pending: list[_Pending] = []

    def write_if_due(self, arena: Arena, share: Share, *, is_last: bool = False) -> None:
        """Write this node's part of a state if one is due, and complete states with all parts.

        Args:
            arena: arena of this node.
            share: share of this node.
            is_last: whether this is the last call: the newest version is due, and the call waits for its parts.
        """
        due = self._due(arena, share, is_last=is_last)
        if due is not None:
            self._last = due.generation, due.version
            self._write(arena, share, due)
        self._complete(arena)
        while is_last and self._pending:
            time.sleep(POLL_EVERY_S)
            self._complete(arena)

    def _due(self, arena: Arena, share: Share, *, is_last: bool) -> Snapshot | None:
        inventory = [replica for replica in arena.inventory() if replica.shard in share.shards]
        committed = sorted({replica.snapshot for replica in inventory if replica.state is SlotState.COMMITTED})
        for snapshot in committed[:-2:-1] if is_last else reversed(committed):
            is_new = self._last is None or (snapshot.generation, snapshot.version) > self._last
            if not is_new or snapshot.version in self._folder.versions():
                continue
            if is_last or share.is_due(snapshot.version):
                return snapshot
        return None

    def _write(self, arena: Arena, share: Share, due: Snapshot) -> None:
        began = time.monotonic()
        try:
            layout = arena.read_layout(due.layout)
            if layout is None:
                raise OverwrittenError(f"the layout of {due.version} no longer exists")
            shards = {shard: self._copy(arena, shard, due) for shard in share.shards}
            copied_s = time.monotonic() - began
            self._folder.prepare()
            require_space(self._folder.path, sum(s.bulk.numel() + len(s.blob) for s in shards.values()))
            parts = Parts(self._folder.path, due)
            parts.write(layout, shards)
        except (DurableError, OSError, RuntimeError) as error:
            self._failed(due.version, error)
            return
        if share.leads:
            self._pending.append(_Pending(parts, layout, read_recipe(arena.path), began, copied_s))

    def _copy(self, arena: Arena, shard: int, due: Snapshot) -> ShardCopy:
        def matches(replica: Replica) -> bool:
            return replica.shard == shard and replica.snapshot == due and replica.state in READABLE

        replicas = [replica for replica in arena.inventory() if matches(replica)]
        return copy_shard({arena.node: arena}, replicas, self._buffers)

    def _complete(self, arena: Arena) -> None:
        """Complete states with all parts; discard those that have waited too long, or for longer than a newer one."""
        for pending in reversed(self._pending):
            version = pending.parts.snapshot.version
            try:
                if missing := pending.parts.missing():
                    if time.monotonic() - pending.began_at < PARTS_WAIT_S:
                        continue
                    raise DurableError(
                        f"the nodes did not write shards {', '.join(map(str, missing))} within {PARTS_WAIT_S:.0f} s: "
                        f"check that {self._folder.path} is a folder shared by all nodes"
                    )
                self._finish(arena, pending)
            except (DurableError, OSError, RuntimeError) as error:
                pending.parts.remove()
                self._failed(version, error)
                self._pending = [other for other in self._pending if other is not pending]
            else:
                # A node that was lost never writes its part of an earlier state.
                self._pending = [other for other in self._pending if other.parts.snapshot.version > version]
                return

    def _finish(self, arena: Arena, pending: _Pending) -> None:
        parts, version = pending.parts, pending.parts.snapshot.version
        notes, merged = arena.notes(), parts.read()
        parts.remove_part_files()
        size_bytes = finish_state(pending.layout, merged.places, pending.recipe, parts.path)
        manifest = Manifest(
            run_id=self._settings.run_id,
            snapshot=parts.snapshot,
            shards=tuple(merged.facts[shard] for shard in range(parts.snapshot.world_size)),
            origin=notes.origin or None,
            logger_identities=notes.logger_identities,
            written_at=time.time(),
        )
        write_manifest(parts.path, manifest)
        with self._folder.locked() as held:
            if not held:
                raise DurableError(f"{self._folder.path}: another process is writing durable states to this folder")
            path = self._folder.complete(parts.path, version)
            for old in states_to_drop(self._folder.versions(), version, self._settings.keep):
                self._folder.drop(old)
            remove_parts_up_to(self._folder.path, version)
        self._ledger.record(
            "durable_written",
            step=version.optimizer_step,
            validation_done=version.validation_done,
            path=str(path),
            bytes=size_bytes,
            copied_s=round(pending.copied_s, 6),
            total_s=round(time.monotonic() - pending.began_at, 6),
            tries=1,
        )
