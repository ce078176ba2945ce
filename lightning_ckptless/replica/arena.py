"""A node's arena: the folder in shared memory with the shards of its ranks and the replicas kept for other ranks.

    <arena_dir>/ckptless-<run id>-<node>/        mode 0700
        arena.json                               format, run, node, owner, origin
        layout-<digest>.json                     how the state is divided into shards
        note-<name>.json                         notes
        votes-<id>                               memory that the ranks share to vote, while they open it
        shard-0003.held-by-0001.<digest>.slot-0  one version of one shard (`slot.py`)

An arena outlives the workers that write it. Its owner is the agent that starts them. After the owner has exited, the
next agent of the same run may adopt the arena, or it may be removed. Contents are used only if user, format, run id and
checksum match.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from lightning_ckptless.errors import ArenaError
from lightning_ckptless.formats.schema import SchemaError
from lightning_ckptless.protocol.versions import Replica
from lightning_ckptless.replica import arena_metadata
from lightning_ckptless.replica.arena_metadata import ArenaMetadata, DamagedArenaError
from lightning_ckptless.replica.arena_notes import ArenaNotes, read_notes, write_notes
from lightning_ckptless.replica.arena_owner import Owner
from lightning_ckptless.replica.arena_space import (
    SPACE_FIX,
    SlotSpace,
    available_memory_bytes,
    default_arena_dir,
    is_in_memory,
    measure_space,
    taken_bytes,
)
from lightning_ckptless.replica.checksum import bytes_of, matches
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.slot import (
    Slot,
    SlotHeader,
    SlotName,
    read_blob,
    read_bulk,
    read_header,
    slot_file_bytes,
)
from lightning_ckptless.replica.slot_stamp import Stamp
from lightning_ckptless.system.memory_files import is_memory_file, is_there, stat_file
from lightning_ckptless.system.private_files import require_private

log = logging.getLogger(__name__)

Hold = Callable[[Sequence[Path], str], None]

_LAYOUT_NAME = re.compile(r"layout-([0-9a-f]+)\.json")

LEAST_SLOTS = 2
"""Slots of a ring without history: one for the committed version, one for the next."""

__all__ = [
    "Arena",
    "ArenaInfo",
    "Owner",
    "Slot",
    "SlotHeader",
    "Stamp",
    "adopt",
    "default_arena_dir",
    "find_arenas",
    "reclaim",
]


class Arena:
    """The arena of one node, for reading and writing.

    Attributes:
        path: folder of the arena.
        node: name of the node.
        run_id: id of the run.
        origin: checkpoint path from which the run was started.
        torn_headers: number of slots that the last `inventory` could not read.
        hold: asks the agent to create slots in anonymous memory, given their paths and the reason; None if there is no
            such agent.
    """

    def __init__(self, path: Path, metadata: ArenaMetadata) -> None:
        self.path = path
        self.node = metadata.node
        self.run_id = metadata.run_id
        self.origin = metadata.origin
        self.torn_headers = 0
        self.hold: Hold | None = None
        self._reason = ""
        self._open_slots: list[Slot] = []
        self._last_layout: Layout | None = None

    @classmethod
    def create(cls, arena_dir: Path, run_id: str, node: str, owner: Owner, *, origin: str | None = None) -> Arena:
        """Create the arena of a node, or attach to it if the same run has already created it.

        Args:
            arena_dir: folder of all arenas.
            run_id: id of the run.
            node: name of the node.
            owner: process whose exit releases the arena.
            origin: checkpoint path from which the run was started.

        Raises:
            ArenaError: the folder cannot be created, belongs to another user, or to a live process other than `owner`.
        """
        path = arena_metadata.folder_of(arena_dir, run_id, node)
        metadata = ArenaMetadata(run_id, node, owner, time.time(), origin)
        while not cls._claim(path, metadata):
            pass
        return cls.attach(path)

    @staticmethod
    def _claim(path: Path, mine: ArenaMetadata) -> bool:
        """Take ownership of the folder; returns False if another run has removed it concurrently as abandoned."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                # Before anything is locked or written: another user may have created a folder or link of this name.
                require_private(path)
        except OSError as error:
            raise ArenaError(
                f"{path}: cannot create the arena: {error}: set arena_dir= to a writable folder"
            ) from error
        with ExitStack() as stack:
            try:
                stack.enter_context(arena_metadata.locked(path, wait=True))
            except FileNotFoundError:
                return False
            found = _metadata_in(path)
            if found is None:
                try:
                    mine.write(path)
                except BaseException:
                    # A folder without metadata is not recognized as an arena and would never be removed.
                    shutil.rmtree(path, ignore_errors=True)
                    raise
            elif found.owner != mine.owner:
                if found.owner.alive():
                    raise ArenaError(
                        f"{path}: run {mine.run_id!r} on node {mine.node!r} belongs to the live process "
                        f"{found.owner.pid}, not to {mine.owner.pid}: start this one with another run id"
                    )
                replace(found, owner=mine.owner).write(path)
        return True

    @classmethod
    def attach(cls, path: Path) -> Arena:
        """Open an existing arena.

        Raises:
            ArenaError: it is unreadable, has another format, or belongs to another user.
        """
        return cls(path, ArenaMetadata.read(path))

    # ------------------------------------------------------------------ slots

    def slots(
        self, shard: int, holder: int, bulk_bytes: int, *, layout: str = "", count: int = LEAST_SLOTS
    ) -> tuple[Slot, ...]:
        """The slots of a ring, created and pre-faulted if missing.

        Args:
            shard: index of the shard.
            holder: rank that keeps the copy.
            bulk_bytes: length of the tensor state in each slot.
            layout: digest of the layout; each layout has its own slots.
            count: number of slots.

        Raises:
            ArenaError: the file system has too little free space, and the agent cannot hold the slots in memory.
        """
        paths = self._slot_paths(shard, holder, layout, count)
        reason = self._require_space(dict.fromkeys(paths, slot_file_bytes(bulk_bytes)))
        missing = [path for path in paths if not is_there(path)]
        # A decision made for the whole node also applies if these slots alone would fit.
        if missing and (reason := self._reason or reason):
            assert self.hold is not None
            self.hold(missing, reason)
        else:
            # These may be links to memory of an agent that has exited.
            for path in missing:
                path.unlink(missing_ok=True)
        return tuple(self._open(path, bulk_bytes) for path in paths)

    def require_space_for(self, rings: Iterable[tuple[int, int]], layout: Layout, *, count: int = LEAST_SLOTS) -> None:
        """Check that the slots of all ranks of this node fit together.

        Every rank checks this before it creates its own slots. Otherwise each of them would find enough space for
        itself, and the last ones would fail halfway.

        Args:
            rings: (shard, holder) of the slot rings of all ranks of the node.
            layout: layout of the state.
            count: number of slots of each ring.

        Raises:
            ArenaError: they fit neither into the file system nor into the agent's memory.
        """
        sizes = {
            path: slot_file_bytes(layout.bulk_bytes(shard))
            for shard, holder in rings
            for path in self._slot_paths(shard, holder, layout.digest, count)
        }
        self._reason = self._require_space(sizes)

    @property
    def usable_bytes(self) -> int:
        """Memory that slots of this arena may use: in its file system, or instead held by the agent."""
        taken = sum(taken_bytes(path) for path, _ in self._slot_files())
        disk = os.statvfs(self.path)
        in_memory = self.hold is not None and is_in_memory(self.path.parent)
        return taken + max(disk.f_bavail * disk.f_frsize, available_memory_bytes() if in_memory else 0)

    def _require_space(self, sizes: Mapping[Path, int]) -> str:
        """Check that slots fit as files or in anonymous memory.

        Returns:
            Why missing slots must be in anonymous memory; empty if they can be files.
        """
        space = measure_space(sizes, self.path)
        # Slots of a node are all of one kind: if some are in memory, the host state of others would not fit either.
        if space.fits and not any(is_memory_file(path) for path, _ in self._slot_files()):
            return ""
        if obstacle := self._obstacle_to_memory(space):
            if space.fits:
                return ""
            raise ArenaError(
                f"{self.path}: {space}, and the agent cannot hold them in anonymous memory: {obstacle}: {SPACE_FIX}"
            )
        return space.in_memory_instead()

    def _obstacle_to_memory(self, space: SlotSpace) -> str:
        """Why the agent cannot hold slots in anonymous memory; empty if it can."""
        if not is_in_memory(self.path.parent):
            return f"{self.path.parent} is on a disk, whose contents may not fit into memory"
        if self.hold is None:
            return "the workers were not started by an agent of this package (`ckptless run`, `python train.py`)"
        available_bytes = available_memory_bytes()
        if space.needed_bytes > available_bytes:
            return f"only {available_bytes} bytes of memory are available on this machine or in this container"
        return ""

    def _slot_paths(self, shard: int, holder: int, layout: str, count: int) -> list[Path]:
        return [self.path / str(SlotName.of(shard, holder, layout, index)) for index in range(count)]

    def _open(self, path: Path, bulk_bytes: int) -> Slot:
        slot = Slot(path, self.run_id, bulk_bytes)
        self._open_slots.append(slot)
        return slot

    def _slot_files(self) -> Iterator[tuple[Path, SlotName]]:
        for path in sorted(self.path.iterdir()):
            if (name := SlotName.parse(path.name)) is not None:
                yield path, name

    @property
    def links_to_memory(self) -> bool:
        """Whether slots are in the memory of an agent, or were in that of an agent that has exited."""
        return any(path.is_symlink() for path, _ in self._slot_files())

    def inventory(self) -> tuple[Replica, ...]:
        """The contents of the slots, read from their headers only. Torn headers are skipped and counted."""
        self.torn_headers = 0
        return tuple(self._replica(header, name.index) for _, name, header in self._headers() if header is not None)

    def written_at(self) -> dict[Replica, float]:
        """The inventory, with the time of the last write to each slot in seconds since the epoch."""
        found = {}
        for replica in self.inventory():
            with suppress(FileNotFoundError):
                found[replica] = stat_file(self._path(replica)).st_mtime
        return found

    def _headers(self) -> Iterator[tuple[Path, SlotName, SlotHeader | None]]:
        for path, name in self._slot_files():
            try:
                header = read_header(path)
            except FileNotFoundError:
                # Another rank of the node has removed it concurrently.
                continue
            except ArenaError:
                self.torn_headers += 1
                header = None
            if header is not None and header.run_id != self.run_id:
                header = None
            yield path, name, header

    def _replica(self, header: SlotHeader, index: int) -> Replica:
        stamp = header.stamp
        return Replica(
            shard=stamp.shard,
            holder=stamp.holder,
            node=self.node,
            slot=index,
            version=stamp.version,
            generation=stamp.generation,
            world_size=stamp.world_size,
            layout=stamp.layout,
            state=header.state,
            bulk_bytes=header.bulk_bytes,
            blob_bytes=header.blob_bytes,
            checksum=header.checksum,
        )

    def verify(self, replica: Replica, threads: int = 1) -> bool:
        """Whether the contents of a replica match its checksum.

        Args:
            replica: the replica.
            threads: number of threads that read it.

        Returns:
            False also if the slot no longer exists.
        """
        try:
            parts = bytes_of(self.read_bulk(replica)), self.read_blob(replica)
            return matches(replica.checksum, parts, threads=threads)
        except ArenaError:
            return False

    def read_bulk(self, replica: Replica) -> torch.Tensor:
        """The tensor state of a replica, mapped: uint8 of shape [bulk_bytes]. Writes into it stay in this process.

        Raises:
            ArenaError: the slot no longer exists.
        """
        try:
            return read_bulk(self._path(replica), replica.bulk_bytes)
        except (OSError, ValueError) as error:
            raise ArenaError(f"{self._path(replica)}: cannot read {replica.bulk_bytes} bytes: {error}") from error

    def read_blob(self, replica: Replica) -> bytes:
        """The host state of a replica.

        Raises:
            ArenaError: the slot no longer exists.
        """
        try:
            return read_blob(self._path(replica), replica.bulk_bytes, replica.blob_bytes)
        except OSError as error:
            raise ArenaError(f"{self._path(replica)}: cannot read {replica.blob_bytes} bytes: {error}") from error

    def _path(self, replica: Replica) -> Path:
        return self.path / str(SlotName.of(replica.shard, replica.holder, replica.layout, replica.slot))

    # ------------------------------------------------------------------ layouts and notes

    def write_layout(self, layout: Layout) -> None:
        """Store a layout, which is kept as long as replicas written with it."""
        arena_metadata.replace_file(self._layout_path(layout.digest), layout.to_bytes())
        self.remember_layout(layout)

    def remember_layout(self, layout: Layout) -> None:
        """Remember a layout that another rank of the node stores, so that it need not be parsed when it is read."""
        self._last_layout = layout

    def read_layout(self, digest: str) -> Layout | None:
        """The layout with a digest; None if this arena does not contain it, or it is damaged."""
        try:
            data = self._layout_path(digest).read_bytes()
            # Parsing takes most of the time of a restore: tens of milliseconds for a thousand tensors.
            if self._last_layout is None or self._last_layout.to_bytes() != data:
                self._last_layout = _parsed(data, digest)
        except (OSError, SchemaError):
            return None
        return self._last_layout

    def read_layouts(self) -> None:
        """Parse and prepare the layouts that this arena contains, so that this process need not when it reads one."""
        names: list[str] = []
        with suppress(FileNotFoundError):
            names = os.listdir(self.path)
        for name in names:
            found = _LAYOUT_NAME.fullmatch(name)
            if found is not None and (layout := self.read_layout(found[1])) is not None:
                layout.prepare()

    def _layout_path(self, digest: str) -> Path:
        return self.path / f"layout-{digest}.json"

    def write_notes(self, notes: ArenaNotes) -> None:
        """Write the notes that are set, such as that the run has finished. The others stay as they are."""
        write_notes(self.path, notes)

    def notes(self) -> ArenaNotes:
        """All notes. Unless an origin was noted, it is the one with which the arena was created."""
        notes = read_notes(self.path)
        return replace(notes, origin=self.origin) if notes.origin is None else notes

    # ------------------------------------------------------------------ space

    def clear(self) -> None:
        """Remove all slots and layouts: the run starts from scratch or from a checkpoint file."""
        self.close()
        for path in [path for path, _ in self._slot_files()] + list(self.path.glob("layout-*.json")):
            path.unlink(missing_ok=True)

    def prune(self, keep: Collection[tuple[int, int]]) -> None:
        """Remove all slot rings except some.

        Args:
            keep: (shard, holder) of the rings to keep.
        """
        for path, name in self._slot_files():
            if (name.shard, name.holder) not in keep:
                path.unlink(missing_ok=True)

    def retain(self, layout: str, generation: int, *, count: int = LEAST_SLOTS) -> None:
        """Remove what a version committed on all ranks has superseded: other layouts and unused slots.

        Args:
            layout: digest of the layout of that version.
            generation: generation that wrote it. A ring without a slot of it belongs to an earlier placement.
            count: number of slots of each ring. More of them are left from a start with a longer history.
        """
        slots = list(self._headers())
        live = {
            name.ring
            for _, name, header in slots
            if header is not None and (header.stamp.layout, header.stamp.generation) == (layout, generation)
        }
        for path in [path for path, name, _ in slots if name.ring not in live or name.index >= count]:
            path.unlink(missing_ok=True)
        for path in self.path.glob("layout-*.json"):
            if path != self._layout_path(layout):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the slots that this object opened, and keep the files."""
        for slot in self._open_slots:
            slot.close()
        self._open_slots.clear()

    def remove(self) -> None:
        """Delete the arena and its contents."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


@lru_cache(maxsize=2)
def _parsed(data: bytes, digest: str) -> Layout:
    return Layout.from_bytes(data, digest)


def _metadata_in(path: Path) -> ArenaMetadata | None:
    """The metadata of an arena folder; None if there is none, or if it is damaged and has no live owner."""
    if not arena_metadata.exists(path):
        return None
    try:
        return ArenaMetadata.read(path)
    except DamagedArenaError as error:
        if (owner := arena_metadata.living_owner(path)) is not None:
            raise ArenaError(f"{error} after process {owner.pid} has exited, or use another run id") from error
        log.warning("ckptless: %s", f"{error.args[0]}; it is cleared and reused")
        for file in path.iterdir():
            file.unlink()
        return None


@dataclass(frozen=True)
class ArenaInfo:
    """A description of an arena.

    Args:
        path: folder of the arena.
        run_id: run to which it belongs.
        node: name of the node that writes it.
        owner: process whose exit releases it.
        owner_alive: whether that process is still running.
        bytes: memory that its files occupy.
        created_at: wall clock of its creation, in seconds since the epoch.
        origin: checkpoint path from which the run was started.
    """

    path: Path
    run_id: str
    node: str
    owner: Owner
    owner_alive: bool
    bytes: int
    created_at: float
    origin: str | None


def find_arenas(arena_dir: Path, run_id: str | None = None) -> tuple[ArenaInfo, ...]:
    """The arenas of this user in a folder. Folders that are not readable as an arena are skipped.

    Args:
        arena_dir: folder of all arenas.
        run_id: only those of this run.
    """
    found = []
    for path in sorted(arena_dir.glob(f"{arena_metadata.FOLDER_PREFIX}*")):
        try:
            info = _info(path, ArenaMetadata.read(path))
        except (ArenaError, FileNotFoundError):
            # Not an arena, or one that its run has just removed.
            continue
        if run_id in (None, info.run_id):
            found.append(info)
    return tuple(found)


def _info(path: Path, metadata: ArenaMetadata) -> ArenaInfo:
    return ArenaInfo(
        path=path,
        run_id=metadata.run_id,
        node=metadata.node,
        owner=metadata.owner,
        owner_alive=metadata.owner.alive(),
        bytes=sum(taken_bytes(file) for file in path.iterdir()),
        created_at=metadata.created_at,
        origin=metadata.origin,
    )


def adopt(info: ArenaInfo, *, node: str, owner: Owner) -> Arena | None:
    """Adopt an arena whose owner has exited.

    The lock of its folder decides between concurrent calls. The loser finds a live owner or no folder.

    Args:
        info: the arena, as returned by `find_arenas`.
        node: name of the node that adopts it.
        owner: its new owner.

    Returns:
        The arena under its new name; None if another process adopted it, or the node already has an arena.
    """
    target = arena_metadata.folder_of(info.path.parent, info.run_id, node)
    try:
        with arena_metadata.locked(info.path, wait=False) as held:
            metadata = ArenaMetadata.read(info.path)
            if not held or metadata.owner.alive() or (target != info.path and target.exists()):
                return None
            # The owner is written first: a crash after that leaves an intact arena under one of the two names.
            replace(metadata, node=node, owner=owner).write(info.path)
            info.path.rename(target)
    except (FileNotFoundError, ArenaError):
        return None
    return Arena.attach(target)


def reclaim(arena_dir: Path, *, now: float, keep_s: float) -> tuple[Path, ...]:
    """Remove abandoned arenas of any run: those unused for a while whose owners have exited.

    Args:
        arena_dir: folder of all arenas.
        now: wall clock, in seconds since the epoch.
        keep_s: seconds for which an arena is kept after its last use.

    Returns:
        The removed folders.
    """
    removed = []
    for info in find_arenas(arena_dir):
        try:
            if info.owner_alive or now - _last_used_at(info.path) <= keep_s:
                continue
            with arena_metadata.locked(info.path, wait=False) as held:
                if held and not ArenaMetadata.read(info.path).owner.alive():
                    shutil.rmtree(info.path, ignore_errors=True)
                    removed.append(info.path)
        except (FileNotFoundError, ArenaError):
            continue
    return tuple(removed)


def _last_used_at(path: Path) -> float:
    times = [path.stat().st_mtime]
    for file in path.iterdir():
        # Notes and metadata files may be replaced at any time.
        with suppress(FileNotFoundError):
            times.append(stat_file(file).st_mtime)
    return max(times)
