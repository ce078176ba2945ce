"""A node's arena: the folder in shared memory that holds its ranks' shards and the replicas it keeps for peers.

    <arena_dir>/ckptless-<run id>-<node>/        mode 0700
        arena.json                               format, run, node, owner, origin
        layout-<digest>.json                     how the state is cut into shards
        note-<name>.json                         small facts
        shard-0003.kept-by-0001.<digest>.slot-0  one version of one shard (`slot.py`)

It outlives the processes that write it. Its owner is the process that starts them, the agent; when the owner has ended,
the arena may be adopted by the next agent of the same run, or removed. What is found here is believed only with the
right user, format, run id and checksum.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lightning_ckptless.errors import ArenaError
from lightning_ckptless.formats.schema import SchemaError
from lightning_ckptless.protocol.versions import Replica
from lightning_ckptless.replica import arena_metadata as arena_facts
from lightning_ckptless.replica.arena_metadata import DamagedArenaError, Facts
from lightning_ckptless.replica.arena_notes import Json, read_notes, write_note
from lightning_ckptless.replica.arena_owner import Owner
from lightning_ckptless.replica.arena_space import (
    MAKE_ROOM,
    Room,
    available_memory_bytes,
    default_arena_dir,
    find_room,
    is_in_memory,
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
    """The folder of one node, for reading and writing.

    Attributes:
        path: the folder.
        node: name of the node.
        run_id: the run.
        origin: checkpoint path that the run was asked to begin from.
        torn_headers: slots that the last `inventory` could not read.
        hold: has the agent make slots of anonymous memory, for a reason in words; None where no agent can.
    """

    def __init__(self, path: Path, facts: Facts) -> None:
        self.path = path
        self.node = facts.node
        self.run_id = facts.run_id
        self.origin = facts.origin
        self.torn_headers = 0
        self.hold: Hold | None = None
        self._reason = ""
        self._open_slots: list[Slot] = []

    @classmethod
    def create(cls, arena_dir: Path, run_id: str, node: str, owner: Owner, *, origin: str | None = None) -> Arena:
        """Make the arena of a node, or attach to it where the same run has made it already.

        Args:
            arena_dir: folder of all arenas.
            run_id: the run.
            node: name of the node.
            owner: process whose end releases the arena.
            origin: checkpoint path that the run was asked to begin from.

        Raises:
            ArenaError: the folder cannot be made, or belongs to another user, or to a live process other than `owner`.
        """
        path = arena_facts.folder_of(arena_dir, run_id, node)
        facts = Facts(run_id, node, owner, time.time(), origin)
        while not cls._claim(path, facts):
            pass
        return cls.attach(path)

    @staticmethod
    def _claim(path: Path, mine: Facts) -> bool:
        """Make the folder ours; returns False where another job has removed it meanwhile, as one of a dead run."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                # Before anything is locked or written: another user may have made a folder or a link of this name.
                require_private(path)
        except OSError as error:
            raise ArenaError(f"{path}: cannot make the arena: {error}: set arena_dir= to a writable folder") from error
        with ExitStack() as stack:
            try:
                stack.enter_context(arena_facts.locked(path, wait=True))
            except FileNotFoundError:
                return False
            facts = _facts_in(path)
            if facts is None:
                try:
                    mine.write(path)
                except BaseException:
                    # A folder without facts is no arena: nothing that looks for arenas would ever remove it.
                    shutil.rmtree(path, ignore_errors=True)
                    raise
            elif facts.owner != mine.owner:
                if facts.owner.alive():
                    raise ArenaError(
                        f"{path}: run {mine.run_id!r} on node {mine.node!r} belongs to the live process "
                        f"{facts.owner.pid}, not to {mine.owner.pid}: start this one under another run id"
                    )
                replace(facts, owner=mine.owner).write(path)
        return True

    @classmethod
    def attach(cls, path: Path) -> Arena:
        """Open an arena that exists.

        Raises:
            ArenaError: it is unreadable, of another format, or belongs to another user.
        """
        return cls(path, Facts.read(path))

    # ------------------------------------------------------------------ slots

    def slots(self, shard: int, holder: int, bulk_bytes: int, *, layout: str = "") -> tuple[Slot, Slot]:
        """The two slots of a slot pair, made and pre-faulted where they are missing.

        Args:
            shard: index of the shard.
            holder: rank that keeps it here.
            bulk_bytes: length of the tensor part of each.
            layout: digest of the layout: another layout gets slots of its own.

        Raises:
            ArenaError: the file system has too little free space, and the agent cannot hold them in memory instead.
        """
        paths = self._slot_paths(shard, holder, layout)
        reason = self._require_room(dict.fromkeys(paths, slot_file_bytes(bulk_bytes)))
        missing = [path for path in paths if not is_there(path)]
        # What was decided for all of the node counts, where these two alone would fit.
        if missing and (reason := self._reason or reason):
            assert self.hold is not None
            self.hold(missing, reason)
        else:
            # Links to memory of an agent that has ended.
            for path in missing:
                path.unlink(missing_ok=True)
        first = self._open(paths[0], bulk_bytes)
        return first, self._open(paths[1], bulk_bytes)

    def require_room_for(self, slot_pairs: Iterable[tuple[int, int]], layout: Layout) -> None:
        """Refuse to begin where the slots of all ranks of this node do not fit together.

        Each rank asks before it makes its own. Otherwise every one of them would find room for itself, and the last
        ones would fail halfway.

        Args:
            slot_pairs: (shard, holder) of each, of all ranks of the node.
            layout: how the state is cut.

        Raises:
            ArenaError: they cannot be memory of the agent either: with the bytes needed and free, and what to do.
        """
        sizes = {
            path: slot_file_bytes(layout.bulk_bytes(shard))
            for shard, holder in slot_pairs
            for path in self._slot_paths(shard, holder, layout.digest)
        }
        self._reason = self._require_room(sizes)

    def _require_room(self, sizes: Mapping[Path, int]) -> str:
        """Refuse slots that do not fit, neither as files nor in anonymous memory.

        Returns:
            Why those that are missing must be anonymous memory; empty where they are to be files.
        """
        room = find_room(sizes, self.path)
        # All of a node alike: where some are in memory already, the host state of the others would not fit either.
        if room.fits and not any(is_memory_file(path) for path, _ in self._slot_files()):
            return ""
        if obstacle := self._obstacle_to_memory(room):
            if room.fits:
                return ""
            raise ArenaError(
                f"{self.path}: {room}, and they cannot be anonymous memory of the agent: {obstacle}: {MAKE_ROOM}"
            )
        return room.in_memory_instead()

    def _obstacle_to_memory(self, room: Room) -> str:
        """Why slots cannot be anonymous memory of the agent; empty where they can."""
        if not is_in_memory(self.path.parent):
            return f"{self.path.parent} is on a disk, which takes what memory may not"
        if self.hold is None:
            return "the workers were not started by an agent of this package (`ckptless run`, `python train.py`)"
        available_bytes = available_memory_bytes()
        if room.needed_bytes > available_bytes:
            return f"{available_bytes} bytes of memory are left to this machine or container"
        return ""

    def _slot_paths(self, shard: int, holder: int, layout: str) -> list[Path]:
        return [self.path / str(SlotName.of(shard, holder, layout, index)) for index in (0, 1)]

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
        """Whether slots are memory of an agent, or were that of one that has ended."""
        return any(path.is_symlink() for path, _ in self._slot_files())

    def inventory(self) -> tuple[Replica, ...]:
        """What the slots hold, read from their headers only. A torn header is left out and counted."""
        self.torn_headers = 0
        return tuple(self._replica(header, name.index) for _, name, header in self._headers() if header is not None)

    def _headers(self) -> Iterator[tuple[Path, SlotName, SlotHeader | None]]:
        for path, name in self._slot_files():
            try:
                header = read_header(path)
            except FileNotFoundError:
                # Another rank of the node has dropped it meanwhile.
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
        """Whether a replica's bytes, read by so many threads, match its checksum. False where they are gone."""
        try:
            parts = bytes_of(self.read_bulk(replica)), self.read_blob(replica)
            return matches(replica.checksum, parts, threads=threads)
        except ArenaError:
            return False

    def read_bulk(self, replica: Replica) -> torch.Tensor:
        """The tensor part of a replica, mapped: uint8 of shape [bulk_bytes]. Writes into it stay in this process.

        Raises:
            ArenaError: the slot is gone.
        """
        try:
            return read_bulk(self._path(replica), replica.bulk_bytes)
        except (OSError, ValueError) as error:
            raise ArenaError(f"{self._path(replica)}: cannot read {replica.bulk_bytes} bytes: {error}") from error

    def read_blob(self, replica: Replica) -> bytes:
        """The host state of a replica.

        Raises:
            ArenaError: the slot is gone.
        """
        try:
            return read_blob(self._path(replica), replica.bulk_bytes, replica.blob_bytes)
        except OSError as error:
            raise ArenaError(f"{self._path(replica)}: cannot read {replica.blob_bytes} bytes: {error}") from error

    def _path(self, replica: Replica) -> Path:
        return self.path / str(SlotName.of(replica.shard, replica.holder, replica.layout, replica.slot))

    # ------------------------------------------------------------------ layouts and notes

    def write_layout(self, layout: Layout) -> None:
        """Keep a layout for as long as replicas written with it are kept."""
        arena_facts.replace_file(self._layout_path(layout.digest), layout.to_bytes())

    def read_layout(self, digest: str) -> Layout | None:
        """The layout with a digest; None where this arena has none, or a damaged one."""
        try:
            return Layout.from_bytes(self._layout_path(digest).read_bytes(), digest)
        except (OSError, SchemaError):
            return None

    def _layout_path(self, digest: str) -> Path:
        return self.path / f"layout-{digest}.json"

    def note(self, name: str, value: Json) -> None:
        """Keep a small fact, such as that the run has finished; the last one counts."""
        write_note(self.path, name, value)

    def notes(self) -> dict[str, Any]:
        """The facts that were noted, and `origin` where the run has one."""
        origin = {} if self.origin is None else {"origin": self.origin}
        return origin | read_notes(self.path)

    # ------------------------------------------------------------------ room

    def clear(self) -> None:
        """Drop all slots and layouts: the run starts afresh, or from a checkpoint file."""
        self.close()
        for path in [path for path, _ in self._slot_files()] + list(self.path.glob("layout-*.json")):
            path.unlink(missing_ok=True)

    def prune(self, keep: Collection[tuple[int, int]]) -> None:
        """Drop the slots of all slot_pairs but some.

        Args:
            keep: (shard, holder) of the slot_pairs that stay.
        """
        for path, name in self._slot_files():
            if (name.shard, name.holder) not in keep:
                path.unlink(missing_ok=True)

    def retain(self, layout: str, generation: int) -> None:
        """Drop what a version that is committed everywhere has replaced: other layouts, and unused slot pairs.

        Args:
            layout: digest of the layout of that version.
            generation: membership that wrote it. A slot pair without a slot of it belongs to a placement of the past.
        """
        slots = list(self._headers())
        live = {
            name.slot_pair
            for _, name, header in slots
            if header is not None and (header.stamp.layout, header.stamp.generation) == (layout, generation)
        }
        for path in [path for path, name, _ in slots if name.slot_pair not in live]:
            path.unlink(missing_ok=True)
        for path in self.path.glob("layout-*.json"):
            if path != self._layout_path(layout):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the slots that this object opened; the files stay."""
        for slot in self._open_slots:
            slot.close()
        self._open_slots.clear()

    def remove(self) -> None:
        """Delete the arena with all it holds."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


def _facts_in(path: Path) -> Facts | None:
    """What a folder says that it is; None where it says nothing, or is damaged and has no live owner."""
    if not arena_facts.exists(path):
        return None
    try:
        return Facts.read(path)
    except DamagedArenaError as error:
        if (owner := arena_facts.living_owner(path)) is not None:
            raise ArenaError(f"{error} after process {owner.pid} has ended, or start under another run id") from error
        log.warning("ckptless: %s", f"{error.args[0]}; it is emptied and used again")
        for file in path.iterdir():
            file.unlink()
        return None


@dataclass(frozen=True)
class ArenaInfo:
    """An arena as it is seen from outside.

    Args:
        path: its folder.
        run_id: run that it belongs to.
        node: name of the node that fills it.
        owner: process whose end releases it.
        owner_alive: whether that process still runs.
        bytes: memory that its files take.
        created_at: wall clock of its making, in seconds since the epoch.
        origin: checkpoint path that the run was asked to begin from.
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
    """The arenas of this user in a folder; what is not readable as one is left out.

    Args:
        arena_dir: folder of all arenas.
        run_id: only those of this run.
    """
    found = []
    for path in sorted(arena_dir.glob(f"{arena_facts.FOLDER_PREFIX}*")):
        try:
            info = _info(path, Facts.read(path))
        except (ArenaError, FileNotFoundError):
            # No arena, or one that its run has just removed.
            continue
        if run_id in (None, info.run_id):
            found.append(info)
    return tuple(found)


def _info(path: Path, facts: Facts) -> ArenaInfo:
    return ArenaInfo(
        path=path,
        run_id=facts.run_id,
        node=facts.node,
        owner=facts.owner,
        owner_alive=facts.owner.alive(),
        bytes=sum(taken_bytes(file) for file in path.iterdir()),
        created_at=facts.created_at,
        origin=facts.origin,
    )


def adopt(info: ArenaInfo, *, node: str, owner: Owner) -> Arena | None:
    """Take over an arena whose owner is dead.

    The lock of its folder decides between two takers; the loser finds a live owner, or no folder.

    Args:
        info: the arena, as `find_arenas` gave it.
        node: name of the node that goes on with it.
        owner: its new owner.

    Returns:
        The arena under its new name; None if somebody else won, or the node has an arena of its own.
    """
    target = arena_facts.folder_of(info.path.parent, info.run_id, node)
    try:
        with arena_facts.locked(info.path, wait=False) as held:
            facts = Facts.read(info.path)
            if not held or facts.owner.alive() or (target != info.path and target.exists()):
                return None
            # Owner first: from here on a crash leaves an arena that is whole, under one name or the other.
            replace(facts, node=node, owner=owner).write(info.path)
            info.path.rename(target)
    except (FileNotFoundError, ArenaError):
        return None
    return Arena.attach(target)


def reclaim(arena_dir: Path, *, now: float, keep_s: float) -> tuple[Path, ...]:
    """Remove the arenas, of any run, that were made long ago and whose owners are gone.

    Args:
        arena_dir: folder of all arenas.
        now: wall clock, in seconds since the epoch.
        keep_s: seconds for which an arena is kept after its last use.

    Returns:
        The folders removed.
    """
    removed = []
    for info in find_arenas(arena_dir):
        try:
            if info.owner_alive or now - _last_used_at(info.path) <= keep_s:
                continue
            with arena_facts.locked(info.path, wait=False) as held:
                if held and not Facts.read(info.path).owner.alive():
                    shutil.rmtree(info.path, ignore_errors=True)
                    removed.append(info.path)
        except (FileNotFoundError, ArenaError):
            continue
    return tuple(removed)


def _last_used_at(path: Path) -> float:
    times = [path.stat().st_mtime]
    for file in path.iterdir():
        # A small file is replaced by another one of its name at any time.
        with suppress(FileNotFoundError):
            times.append(stat_file(file).st_mtime)
    return max(times)
