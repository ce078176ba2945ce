"""The folder of a run's durable states.

    <durable_dir>/                     mode 0700
        ckptless-durable.json          says that the folder is ours; locked by the one process that writes here
        step-0000000120/               one state: complete, for it gets this name last
            state.json                 what it holds: version, run, and a checksum for each shard
            layout.json                how the tensors are cut
            places.json                where in the files each piece lies
            recipe.json                how a Lightning checkpoint is put together from it
            .metadata, __0_0.distcp    torch.distributed.checkpoint's: one file per shard
        .step-0000000130.part          on its way, or left by a writer that was killed

A state becomes visible by a rename, when all its files are on the disk. What is not visible is nobody's state.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_ckptless.errors import DurableError, OptionsError
from lightning_ckptless.formats.schema import (
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
from lightning_ckptless.protocol.durable_schedule import DurableState, state_name, version_of
from lightning_ckptless.protocol.versions import Snapshot, Version
from lightning_ckptless.replica.arena_metadata import RUN_ID
from lightning_ckptless.replica.slot_stamp import BYTES, CHECKSUM, SNAPSHOT
from lightning_ckptless.system.private_files import require_private, require_private_files, target_of_own_link

FORMAT = 2
MARKER = "ckptless-durable.json"
_MANIFEST = "state.json"
_KIND = "durable state"
_PART = ".part"
_GOING = ".going"


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """One shard of a durable state.

    Args:
        bulk_bytes: length of its tensor part.
        blob_bytes: length of its rank's host state.
        checksum: digest of both, as the rank that staged it has computed it.
    """

    bulk_bytes: int
    blob_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a durable state says of itself.

    Args:
        run_id: run that has written it.
        snapshot: version, generation, world size and digest of the layout.
        shards: one per rank.
        origin: checkpoint file that the run began from.
        logger_identities: the runs that its loggers write to.
        written_at: wall clock, in seconds since the epoch.
    """

    run_id: str
    snapshot: Snapshot
    shards: tuple[ShardFacts, ...]
    origin: str | None
    logger_identities: list[dict[str, Any]] | None
    written_at: float

    def to_bytes(self) -> bytes:
        """As JSON."""
        return seal(_KIND, FORMAT, asdict(self))

    @classmethod
    def read(cls, state: Path) -> Manifest:
        """The manifest of a state's folder.

        Raises:
            DurableError: the folder is no state that can be read, is damaged, of another version than its name says, or
                another user may have written to it.
        """
        try:
            require_private_files(state)
            manifest: Manifest = unseal((state / _MANIFEST).read_bytes(), _KIND, FORMAT, _SCHEMA)
        except PermissionError as error:
            raise DurableError(str(error)) from error
        except (OSError, SchemaError) as error:
            raise DurableError(f"{state / _MANIFEST}: {error}") from error
        found, named = manifest.snapshot.version, version_of(state.name)
        if named not in (None, found):
            raise DurableError(f"{state / _MANIFEST}: it is of {found}, and its folder is that of {named}")
        return manifest

    def state(self, path: Path) -> DurableState:
        """The state as the protocol knows it."""
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
        path: the folder; need not be there.

    Attributes:
        left_out: why states were left out when they were last looked for, by their folders.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out: dict[Path, str] = {}

    def require_ours(self) -> None:
        """Refuse a folder that holds something else; makes nothing.

        Raises:
            OptionsError: it is a file, of another user or another format, open to other users, or holds what is not
                ours.
        """
        try:
            if not os.path.lexists(self.path):
                return
            if not self.path.is_dir():
                raise OptionsError(f"durable_dir={str(self.path)!r} is no folder: name one that is empty or missing")
            require_private(target_of_own_link(self.path))
            if (marker := self.path / MARKER).exists():
                number = json.loads(marker.read_bytes()).get("format")
                if number != FORMAT:
                    raise OptionsError(
                        f"durable_dir={str(self.path)!r} holds durable states of format {number}, expected {FORMAT}: "
                        "name another folder"
                    )
                return
            strangers = sorted(path.name for path in self.path.iterdir())
        except PermissionError as error:
            raise OptionsError(f"durable_dir={str(self.path)!r} is not safe: {error}; or name a new folder") from error
        except (OSError, ValueError, AttributeError) as error:
            raise OptionsError(f"durable_dir={str(self.path)!r} cannot be read: {error}: name another one") from error
        if strangers:
            raise OptionsError(
                f"durable_dir={str(self.path)!r} is not ours: it holds {', '.join(strangers[:3])}"
                f"{' and more' if len(strangers) > 3 else ''} and no {MARKER}: name an empty folder or a missing one"
            )

    def prepare(self) -> None:
        """Make the folder, and mark it as ours.

        Raises:
            OptionsError: it holds something else.
            OSError: it cannot be made.
        """
        self.require_ours()
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        marker = self.path / MARKER
        if not marker.exists():
            write_synced(marker, json.dumps({"format": FORMAT}).encode())

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold the folder for writing; yields False where another process does. Its holder's death releases it."""
        # For writing, which is what a lock takes on a network file system.
        with (self.path / MARKER).open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    # ------------------------------------------------------------------ reading

    def states(self) -> list[tuple[Path, Manifest]]:
        """The complete states, the newest last; what cannot be read as one is left out."""
        found = []
        self.left_out = {}
        for path in self._folders():
            try:
                found.append((path, Manifest.read(path)))
            except DurableError as error:
                self.left_out[path] = str(error)
        return sorted(found, key=lambda entry: entry[1].snapshot)

    def versions(self) -> tuple[Version, ...]:
        """The versions of which there is a folder, in order."""
        return tuple(sorted(version for path in self._folders() if (version := version_of(path.name)) is not None))

    def _folders(self) -> list[Path]:
        try:
            return [path for path in self.path.iterdir() if version_of(path.name) is not None]
        except (FileNotFoundError, NotADirectoryError):
            return []

    # ------------------------------------------------------------------ writing

    def begin(self, version: Version) -> Path:
        """An empty folder for a state on its way."""
        part = self.path / f".{state_name(version)}{_PART}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700)
        return part

    def complete(self, part: Path, version: Version) -> Path:
        """Let a state be seen, in the place of one of the same version if there is one."""
        target = self.path / state_name(version)
        sync(part)
        if target.exists():
            # The same version again, of a run that has gone back and come here once more.
            self._remove(target)
        part.rename(target)
        sync(self.path)
        return target

    def drop(self, version: Version) -> None:
        """Remove a state; in one step, as far as readers see."""
        self._remove(self.path / state_name(version))

    def _remove(self, state: Path) -> None:
        going = state.with_name(f".{state.name}{_GOING}")
        shutil.rmtree(going, ignore_errors=True)
        state.rename(going)
        shutil.rmtree(going, ignore_errors=True)

    def tidy(self) -> None:
        """Remove what a writer that was killed has left; called by the one that holds the lock."""
        for path in self.path.iterdir():
            if path.name.endswith((_PART, _GOING)) and version_of(path.name[1:].rpartition(".")[0]) is not None:
                shutil.rmtree(path, ignore_errors=True)


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(state: Path, manifest: Manifest) -> None:
    """Put the manifest into a state's folder."""
    write_synced(state / _MANIFEST, manifest.to_bytes())


def sync(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
