"""What an arena says about itself: `arena.json`, the lock around it, and the notes that lie beside it."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from lightning_ckptless.errors import ArenaError
from lightning_ckptless.private_files import open_own_folder, require_private
from lightning_ckptless.replica.owner import Owner

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
"""What a note may hold."""

FORMAT = 1
FOLDER_PREFIX = "ckptless-"
_FACTS = "arena.json"
_NOTE_PREFIX = "note-"


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
        replace_file(folder / _FACTS, json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Facts:
        """The facts of an arena.

        Raises:
            ArenaError: the folder is no arena, belongs to another user or has another format.
        """
        try:
            with open_own_folder(folder) as handle:
                require_private(folder, os.fstat(handle))
                fields = json.loads(_read(_FACTS, handle))
            if (number := fields.pop("format", None)) != FORMAT:
                raise ArenaError(f"{folder}: arena format {number}, expected {FORMAT}: remove it with `ckptless clean`")
            return cls(owner=Owner(**fields.pop("owner")), **fields)
        except ArenaError:
            raise
        except PermissionError as error:
            raise ArenaError(str(error)) from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArenaError(f"{folder}: not an arena that can be read: {error!r}") from error


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


def write_note(folder: Path, name: str, value: Json) -> None:
    """Put a named fact beside the arena's own."""
    replace_file(folder / f"{_NOTE_PREFIX}{quote(name, safe='')}.json", json.dumps(value).encode())


def read_notes(folder: Path) -> dict[str, Any]:
    """All named facts of an arena."""
    return {
        unquote(path.name.removeprefix(_NOTE_PREFIX).removesuffix(".json")): json.loads(path.read_bytes())
        for path in sorted(folder.glob(f"{_NOTE_PREFIX}*.json"))
    }
