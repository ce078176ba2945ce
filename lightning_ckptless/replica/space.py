"""Room for arenas: where they go by default, what their files take, and whether more fits."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

from lightning_ckptless import environment
from lightning_ckptless.errors import ArenaError

SHARED_MEMORY = Path("/dev/shm")
_BLOCK_BYTES = 512
"""Unit of `st_blocks`, whatever the file system."""


def default_arena_dir() -> Path:
    """Folder for arenas: what the environment names, shared memory, else one of temporary files, with a warning."""
    if named := os.environ.get(environment.ARENA_DIR):
        return Path(named)
    if os.access(SHARED_MEMORY, os.W_OK | os.X_OK) and SHARED_MEMORY.is_mount():
        return SHARED_MEMORY
    fallback = Path(tempfile.gettempdir()) / f"ckptless-arenas-{os.getuid()}"
    fallback.mkdir(mode=0o700, exist_ok=True)
    warnings.warn(
        f"{SHARED_MEMORY} is not a writable memory file system: arenas go to {fallback}, where mirroring is slower. "
        f"Set arena_dir= to choose another folder.",
        stacklevel=2,
    )
    return fallback


def taken_bytes(path: Path) -> int:
    """Memory that a file takes; 0 where there is none."""
    try:
        return path.stat().st_blocks * _BLOCK_BYTES
    except FileNotFoundError:
        return 0


def require_room(paths: Iterable[Path], file_bytes: int, folder: Path) -> None:
    """Refuse to make files that do not fit.

    Args:
        paths: the files; those that exist count with what they have already.
        file_bytes: length that each shall have.
        folder: where they lie.

    Raises:
        ArenaError: with the bytes needed, the bytes free, and what to do.
    """
    needed_bytes = sum(max(0, file_bytes - taken_bytes(path)) for path in paths)
    disk = os.statvfs(folder)
    free_bytes = disk.f_bavail * disk.f_frsize
    if needed_bytes > free_bytes:
        raise ArenaError(
            f"{folder}: two slots need {needed_bytes} more bytes, but {free_bytes} are free in {folder.parent}: "
            f"set arena_dir= to a larger file system, keep fewer copies or a smaller state, "
            f"or enlarge the mount (mount -o remount,size=...)"
        )
