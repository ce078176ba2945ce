"""The metadata of an arena, `arena.json`, and the lock of its folder."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from lightning_ckptless.errors import ArenaError
from lightning_ckptless.formats.schema import PID, SchemaError, number, optional, record, text
from lightning_ckptless.formats.sealed import FormatError, parse, seal, unseal
from lightning_ckptless.replica.arena_owner import OWNER, Owner
from lightning_ckptless.system.private_files import open_own_folder, require_private

FORMAT = 3
FOLDER_PREFIX = "ckptless-"
_FILE_NAME = "arena.json"
_KIND = "arena"


class DamagedArenaError(ArenaError):
    """The metadata of an arena is damaged."""


@dataclass(frozen=True)
class ArenaMetadata:
    """The run, node and owner of an arena.

    Args:
        run_id: run to which it belongs.
        node: name of the node that writes it.
        owner: process whose exit releases it.
        created_at: wall clock of its creation, in seconds since the epoch.
        origin: checkpoint path from which the run was started.
    """

    run_id: str
    node: str
    owner: Owner
    created_at: float
    origin: str | None

    def write(self, folder: Path) -> None:
        """Write the metadata into an arena's folder."""
        replace_file(folder / _FILE_NAME, seal(_KIND, FORMAT, asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> ArenaMetadata:
        """Read the metadata of an arena.

        Raises:
            DamagedArenaError: the metadata is damaged.
            ArenaError: the folder is not an arena, belongs to another user or has another format.
        """
        try:
            with open_own_folder(folder) as handle:
                require_private(folder, os.fstat(handle))
                metadata: ArenaMetadata = unseal(_read(_FILE_NAME, handle), _KIND, FORMAT, _SCHEMA)
        except FormatError as error:
            raise ArenaError(f"{folder}: {error}: remove it with `ckptless clean`") from error
        except SchemaError as error:
            raise DamagedArenaError(f"{folder / _FILE_NAME}: {error}: remove it with `ckptless clean`") from error
        except PermissionError as error:
            raise ArenaError(str(error)) from error
        except OSError as error:
            raise ArenaError(f"{folder}: not a readable arena: {error!r}") from error
        return metadata


NODE = text(".+", longest=1024)
RUN_ID = text(".+", longest=1024)
_NAMED_OWNER = record(
    extra=True,
    owner=record(extra=True, pid=PID, started_at=optional(number())),
)
_SCHEMA = record(ArenaMetadata, run_id=RUN_ID, node=NODE, owner=OWNER, created_at=number(), origin=optional(text()))


def living_owner(folder: Path) -> Owner | None:
    """The live owner named by an arena's metadata, even if the rest is damaged or of another format; None if none."""
    try:
        named = _NAMED_OWNER(parse((folder / _FILE_NAME).read_bytes()), "")["owner"]
    except (OSError, SchemaError):
        return None
    return Owner.running(named["pid"], named["started_at"])


def exists(folder: Path) -> bool:
    """Whether a folder is an arena."""
    return (folder / _FILE_NAME).exists()


def folder_of(arena_dir: Path, run_id: str, node: str) -> Path:
    """The folder of a node's arena."""
    return arena_dir / f"{FOLDER_PREFIX}{quote(run_id, safe='')}-{quote(node, safe='')}"


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of an arena. The kernel releases it if the process dies.

    Args:
        folder: folder of the arena.
        wait: whether to wait while another process holds it.

    Yields:
        Whether the lock is held; False only if `wait` is False.

    Raises:
        ArenaError: the folder belongs to another user.
        OSError: the folder does not exist or was removed, or the path is a link or a file.
    """
    with ExitStack() as stack:
        try:
            handle = stack.enter_context(open_own_folder(folder))
        except PermissionError as error:
            raise ArenaError(str(error)) from error
        is_held = _lock(handle, wait=wait)
        if is_held and not os.path.samestat(os.fstat(handle), folder.lstat()):
            raise FileNotFoundError(f"{folder}: was replaced while waiting for its lock")
        yield is_held


def _lock(handle: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _read(name: str, folder: int) -> bytes:
    with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
        return file.read()


def replace_file(path: Path, content: bytes) -> None:
    """Replace a small file atomically: a reader sees the old or the new content, never a part.

    Raises:
        ArenaError: the file cannot be written, or its folder belongs to another user.
    """
    draft = f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        with open_own_folder(path.parent) as folder:
            try:
                handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.replace(draft, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                with suppress(FileNotFoundError):
                    os.unlink(draft, dir_fd=folder)
                raise
    except OSError as error:
        raise ArenaError(f"{path}: cannot write {len(content)} bytes: {error}") from error
