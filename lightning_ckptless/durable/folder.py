"""The folder of a run's durable states.

    <durable_dir>/                     mode 0700
        ckptless-durable.json          marks the folder as ours; locked by the process that writes here
        step-0000000120/               one complete state
            state.json                 manifest: version, run, and a checksum for each shard
            layout.json                layout of the tensors
            places.json                where each piece is stored in the files
            recipe.json                recipe for a Lightning checkpoint
            .metadata, __0_0.distcp    files of torch.distributed.checkpoint, one per shard
        .step-0000000130.part          incomplete: being written, or left by a killed writer

A state becomes visible by a rename, after all its files have been synced to disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_ckptless.errors import DurableError, OptionsError
from lightning_ckptless.formats.schema import (
    BYTES,
    MOST_RANKS,
    SchemaError,
    as_it_is,
    number,
    optional,
    plain,
    record,
    refused,
    sequence,
    table,
    text,
)
from lightning_ckptless.formats.sealed import seal, unseal
from lightning_ckptless.protocol.durable_schedule import (
    FOLDER_MARKER,
    MANIFEST_NAME,
    DurableState,
    state_name,
    version_of,
)
from lightning_ckptless.protocol.versions import Snapshot, Version
from lightning_ckptless.replica.arena_metadata import RUN_ID
from lightning_ckptless.replica.slot_stamp import CHECKSUM, SNAPSHOT
from lightning_ckptless.system.private_files import require_private, require_private_files, target_of_own_link

FORMAT = 5
_KIND = "durable state"
_PART = ".part"
_GOING = ".going"


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """One shard of a durable state.

    Args:
        bulk_bytes: size of its tensor state.
        blob_bytes: size of its rank's host state.
        checksum: digest of both, computed by the rank that staged it.
    """

    bulk_bytes: int
    blob_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of a durable state.

    Args:
        run_id: run that wrote it.
        snapshot: version, generation, world size and layout digest.
        shards: facts of each shard, one per rank.
        origin: checkpoint file that the run started from.
        logger_identities: the runs that its loggers write to.
        written_at: wall clock in seconds since the epoch.
    """

    run_id: str
    snapshot: Snapshot
    shards: tuple[ShardFacts, ...]
    origin: str | None
    logger_identities: list[dict[str, Any]] | None
    written_at: float

    def to_bytes(self) -> bytes:
        """Serialize the manifest."""
        return seal(_KIND, FORMAT, asdict(self))

    @classmethod
    def read(cls, state: Path) -> Manifest:
        """Read the manifest of a state.

        Raises:
            DurableError: the manifest is missing or damaged, its version differs from the folder name, or another user
                may have written to the folder.
        """
        try:
            require_private_files(state)
            manifest: Manifest = unseal((state / MANIFEST_NAME).read_bytes(), _KIND, FORMAT, _SCHEMA)
        except PermissionError as error:
            raise DurableError(str(error)) from error
        except (OSError, SchemaError) as error:
            raise DurableError(f"{state / MANIFEST_NAME}: {error}") from error
        found, named = manifest.snapshot.version, version_of(state.name)
        if named not in (None, found):
            raise DurableError(f"{state / MANIFEST_NAME}: expected {named}, as in the folder name, found {found}")
        return manifest

    def state(self, path: Path) -> DurableState:
        """Return the state in the form used by the protocol."""
        return DurableState(str(path), self.snapshot, self.run_id, self.origin)


def _manifest(**fields: Any) -> Manifest:
    expected, found = fields["snapshot"].world_size, len(fields["shards"])
    if found != expected:
        raise refused("shards", f"{expected} of them", found)
    return Manifest(**fields)


SHARD_FACTS = record(ShardFacts, bulk_bytes=BYTES, blob_bytes=BYTES, checksum=CHECKSUM)
_SCHEMA = record(
    _manifest,
    run_id=RUN_ID,
    snapshot=SNAPSHOT,
    shards=sequence(SHARD_FACTS, most=MOST_RANKS),
    origin=optional(text()),
    logger_identities=optional(as_it_is(sequence(record(kind=text(), identity=table(text(), plain()))))),
    written_at=number(),
)


class DurableFolder:
    """The folder of one run's durable states.

    Args:
        path: path of the folder, which may be missing.

    Attributes:
        left_out: why folders were skipped by the last call of `states`, by their paths.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out: dict[Path, str] = {}

    def require_ours(self) -> None:
        """Refuse a path that cannot be used as a folder of durable states. Creates nothing.

        Raises:
            OptionsError: it is a file, has another owner or format, is writable by other users, or has other files.
        """
        try:
            if not os.path.lexists(self.path):
                return
            if not self.path.is_dir():
                raise OptionsError(f"durable_dir={str(self.path)!r} is not a folder: use an empty or a new folder")
            require_private(target_of_own_link(self.path))
            if self._is_marked():
                marker = self.path / FOLDER_MARKER
                number = json.loads(marker.read_bytes()).get("format")
                if number != FORMAT:
                    raise OptionsError(
                        f"durable_dir={str(self.path)!r} has durable states of format {number}, expected {FORMAT}: "
                        "use another folder"
                    )
                return
            others = sorted(path.name for path in self.path.iterdir() if not _is_marker(path.name))
        except OptionsError:
            raise
        except PermissionError as error:
            raise OptionsError(f"durable_dir={str(self.path)!r} is not safe: {error}; or use a new folder") from error
        except (OSError, ValueError, AttributeError) as error:
            raise OptionsError(f"durable_dir={str(self.path)!r} cannot be read: {error}: use another folder") from error
        if others:
            raise OptionsError(
                f"durable_dir={str(self.path)!r} is not a folder of durable states: it has {', '.join(others[:3])}"
                f"{' and more' if len(others) > 3 else ''} and no {FOLDER_MARKER}: use an empty or a new folder"
            )

    def prepare(self) -> None:
        """Create the folder and mark it as ours.

        Raises:
            OptionsError: the path cannot be used as a folder of durable states.
            OSError: the folder cannot be created.
        """
        self.require_ours()
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._is_marked():
            # Renamed when it is complete: on a full disk, only a part of it may be written. The writers of several
            # nodes, which may have the same process ids, do this at the same time.
            draft = self.path / f"{FOLDER_MARKER}.{uuid.uuid4().hex}{_PART}"
            try:
                write_synced(draft, json.dumps({"format": FORMAT}).encode())
                draft.rename(self.path / FOLDER_MARKER)
            finally:
                draft.unlink(missing_ok=True)

    def _is_marked(self) -> bool:
        """Whether the folder has a marker. An empty one is the rest of a write to a full disk."""
        marker = self.path / FOLDER_MARKER
        return marker.exists() and marker.stat().st_size > 0

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Lock the folder for writing; yields False if another process holds the lock. A death releases the lock."""
        # Opened for writing, as network file systems require it for an exclusive lock.
        with (self.path / FOLDER_MARKER).open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    # ------------------------------------------------------------------ reading

    def states(self) -> list[tuple[Path, Manifest]]:
        """Return the readable complete states, the newest last; `left_out` has the others."""
        found = []
        self.left_out = {}
        for path in self._folders():
            try:
                found.append((path, Manifest.read(path)))
            except DurableError as error:
                self.left_out[path] = str(error)
        return sorted(found, key=lambda entry: entry[1].snapshot)

    def versions(self) -> tuple[Version, ...]:
        """Return the versions that have a folder, in ascending order."""
        return tuple(sorted(version for path in self._folders() if (version := version_of(path.name)) is not None))

    def _folders(self) -> list[Path]:
        try:
            return [path for path in self.path.iterdir() if version_of(path.name) is not None]
        except (FileNotFoundError, NotADirectoryError):
            return []

    # ------------------------------------------------------------------ writing

    def begin(self, version: Version) -> Path:
        """Create an empty folder for an incomplete state."""
        part = self.path / f".{state_name(version)}{_PART}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700)
        return part

    def complete(self, part: Path, version: Version) -> Path:
        """Make a state visible, and replace one of the same version."""
        target = self.path / state_name(version)
        sync(part)
        if target.exists():
            # The run was restored from an older version and has reached this one again.
            self._remove(target)
        part.rename(target)
        sync(self.path)
        return target

    def drop(self, version: Version) -> None:
        """Remove a state; readers see it completely or not at all."""
        self._remove(self.path / state_name(version))

    def _remove(self, state: Path) -> None:
        going = state.with_name(f".{state.name}{_GOING}")
        shutil.rmtree(going, ignore_errors=True)
        state.rename(going)
        shutil.rmtree(going, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove the files of killed writers. The caller must hold the lock."""
        for path in self.path.iterdir():
            if path.name.endswith((_PART, _GOING)) and version_of(path.name[1:].rpartition(".")[0]) is not None:
                shutil.rmtree(path, ignore_errors=True)


def _is_marker(name: str) -> bool:
    """Whether a file is a marker, complete or not."""
    return name == FOLDER_MARKER or (name.startswith(f"{FOLDER_MARKER}.") and name.endswith(_PART))


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file and sync it to disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(state: Path, manifest: Manifest) -> None:
    """Write the manifest of a state."""
    write_synced(state / MANIFEST_NAME, manifest.to_bytes())


def sync(folder: Path) -> None:
    """Sync a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
