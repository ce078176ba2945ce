"""What an arena says about itself: `arena.json`, and the lock around it."""

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
from lightning_ckptless.formats.schema import SchemaError, integer, number, optional, record, text
from lightning_ckptless.formats.sealed import FormatError, parse, seal, unseal
from lightning_ckptless.replica.arena_owner import HIGHEST_PID, OWNER, Owner
from lightning_ckptless.system.private_files import open_own_folder, require_private

FORMAT = 2
FOLDER_PREFIX = "ckptless-"
_FACTS = "arena.json"
_KIND = "arena"


class DamagedArenaError(ArenaError):
    """What an arena says about itself is damaged."""


@dataclass(frozen=True)
class Facts:
    """Whose arena it is.

    Args:
        run_id: run that it belongs to.
        node: name of the node that fills it.
        owner: process whose end releases it.
        created_at: wall clock of its making, in seconds since the epoch.
        origin: checkpoint path that the run was asked to begin from.
    """

    run_id: str
    node: str
    owner: Owner
    created_at: float
    origin: str | None

    def write(self, folder: Path) -> None:
        """Put the facts into an arena's folder."""
        replace_file(folder / _FACTS, seal(_KIND, FORMAT, asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Facts:
        """The facts of an arena.

        Raises:
            DamagedArenaError: the facts are damaged.
            ArenaError: the folder is no arena, belongs to another user or has another format.
        """
        try:
            with open_own_folder(folder) as handle:
                require_private(folder, os.fstat(handle))
                facts: Facts = unseal(_read(_FACTS, handle), _KIND, FORMAT, _SCHEMA)
        except FormatError as error:
            raise ArenaError(f"{folder}: {error}: remove it with `ckptless clean`") from error
        except SchemaError as error:
            raise DamagedArenaError(f"{folder / _FACTS}: {error}: remove it with `ckptless clean`") from error
        except PermissionError as error:
            raise ArenaError(str(error)) from error
        except OSError as error:
            raise ArenaError(f"{folder}: not an arena that can be read: {error!r}") from error
        return facts


NODE = text(".+", longest=1024)
RUN_ID = text(".+", longest=1024)
_NAMED_OWNER = record(
    extra=True,
    owner=record(extra=True, pid=integer(1, HIGHEST_PID), started_at=optional(number())),
)
_SCHEMA = record(Facts, run_id=RUN_ID, node=NODE, owner=OWNER, created_at=number(), origin=optional(text()))


def living_owner(folder: Path) -> Owner | None:
    """The live process that an arena names as its owner, whatever else of it is damaged or of another format."""
    try:
        named = _NAMED_OWNER(parse((folder / _FACTS).read_bytes()), "")["owner"]
    except (OSError, SchemaError):
        return None
    return Owner.running(named["pid"], named["started_at"])


def exists(folder: Path) -> bool:
    """Whether a folder has been made an arena."""
    return (folder / _FACTS).exists()


def folder_of(arena_dir: Path, run_id: str, node: str) -> Path:
    """Folder of a node's arena."""
    return arena_dir / f"{FOLDER_PREFIX}{quote(run_id, safe='')}-{quote(node, safe='')}"


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of an arena, which its holder's death releases.

    Args:
        folder: the arena.
        wait: whether to wait for another holder.

    Yields:
        Whether the lock is held; False only without waiting.

    Raises:
        ArenaError: the folder is another user's.
        OSError: there is none, or none any more; or the path is a link or a file.
    """
    with ExitStack() as stack:
        try:
            handle = stack.enter_context(open_own_folder(folder))
        except PermissionError as error:
            raise ArenaError(str(error)) from error
        is_held = _lock(handle, wait=wait)
        if is_held and not os.path.samestat(os.fstat(handle), folder.lstat()):
            raise FileNotFoundError(f"{folder}: was replaced while its lock was awaited")
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
    """Put a small file in place at once: a reader sees the old content or the new, never a part.

    Raises:
        ArenaError: it cannot be written, or its folder is another user's.
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
