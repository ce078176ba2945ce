"""Room for arenas: where they go by default, what their files take, and whether more fits."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from lightning_ckptless import environment
from lightning_ckptless.errors import ArenaError
from lightning_ckptless.private_files import require_private

SHARED_MEMORY = Path("/dev/shm")
MAKE_ROOM = (
    "set arena_dir= to a larger file system, keep fewer copies or a smaller state, or enlarge the mount "
    "(mount -o remount,size=...)"
)
"""What to do where arenas do not fit."""
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs")
_BLOCK_BYTES = 512
"""Unit of `st_blocks`, whatever the file system."""


def default_arena_dir() -> Path:
    """Folder for arenas: what the environment names, shared memory, else one of temporary files, with a warning."""
    if named := os.environ.get(environment.ARENA_DIR):
        return Path(named)
    if os.access(SHARED_MEMORY, os.W_OK | os.X_OK) and SHARED_MEMORY.is_mount():
        return SHARED_MEMORY
    fallback = _own_temporary_dir()
    warnings.warn(
        f"{SHARED_MEMORY} is not a writable memory file system: arenas go to {fallback}, where mirroring is slower. "
        f"Set arena_dir= to choose another folder.",
        stacklevel=2,
    )
    return fallback


def _own_temporary_dir() -> Path:
    """A folder in that of temporary files, of the same name in every process of this user.

    Raises:
        ArenaError: another user has made one of this name, or may write to it.
    """
    folder = Path(tempfile.gettempdir()) / f"ckptless-arenas-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        require_private(folder)
    except OSError as error:
        raise ArenaError(
            f"{SHARED_MEMORY} is not a writable memory file system, and {folder} cannot be used in its place: {error}: "
            "set arena_dir= (or CKPTLESS_ARENA_DIR) to a folder of your own"
        ) from error
    return folder


def is_in_memory(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether what lies in a folder is in memory, and ends with the machine.

    Args:
        folder: an arena.
        mounts: the kernel's list of mounted file systems, the newest last.
    """
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounted = [line.partition(" - ") for line in _lines(mounts)]
    kinds = {place.split()[2]: kind.split()[0] for place, is_whole, kind in mounted if is_whole}
    return kinds.get(number) in _MEMORY_FILE_SYSTEMS


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def taken_bytes(path: Path) -> int:
    """Memory that a file takes; 0 where there is none."""
    try:
        return path.stat().st_blocks * _BLOCK_BYTES
    except FileNotFoundError:
        return 0


def require_room(sizes: Mapping[Path, int], folder: Path) -> None:
    """Refuse to make files that do not fit.

    Args:
        sizes: length that each file shall have, in bytes; those that exist count with what they have already.
        folder: where they lie.

    Raises:
        ArenaError: with the bytes needed, the bytes free, and what to do.
    """
    # In this order: what another process makes in between is counted as free and as made, and never as missing.
    free_bytes = _free_bytes(folder)
    needed_bytes = sum(max(0, file_bytes - taken_bytes(path)) for path, file_bytes in sizes.items())
    if needed_bytes > free_bytes:
        raise ArenaError(
            f"{folder}: {len(sizes)} slots need {needed_bytes} more bytes, but {free_bytes} are free in "
            f"{folder.parent}: {MAKE_ROOM}"
        )


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
