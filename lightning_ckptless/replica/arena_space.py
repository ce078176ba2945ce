"""Room for arenas: where they go by default, what their files take, and whether more fits."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from lightning_ckptless import environment
from lightning_ckptless.errors import ArenaError
from lightning_ckptless.system.control_groups import ceiling
from lightning_ckptless.system.memory_files import stat_file
from lightning_ckptless.system.private_files import require_private

SHARED_MEMORY = Path("/dev/shm")
MAKE_ROOM = (
    "enlarge the mount (docker run --shm-size=..., in Kubernetes a volume of `medium: Memory`, elsewhere mount -o "
    "remount,size=...), set arena_dir= to a larger file system, or keep fewer copies or a smaller state"
)
"""What to do where arenas do not fit."""
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs")
_SPARE = 1.1
"""For the host state of each rank, which is written after the tensors, and notes."""
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


def available_memory_bytes() -> int:
    """Memory that this process may still take. Beyond it the kernel refuses nothing, and kills processes."""
    left, group = int(psutil.virtual_memory().available), ceiling("memory")
    return left if group is None else min(left, group.room)


def taken_bytes(path: Path) -> int:
    """Memory that a file takes; 0 where there is none."""
    try:
        return stat_file(path).st_blocks * _BLOCK_BYTES
    except FileNotFoundError:
        return 0


@dataclass(frozen=True, slots=True)
class Room:
    """What slots need of a file system, and what it has.

    Args:
        folder: where they lie.
        slots: how many.
        needed_bytes: beyond what those that exist take already.
        free_bytes: on the file system.
        total_bytes: of the file system.
    """

    folder: Path
    slots: int
    needed_bytes: int
    free_bytes: int
    total_bytes: int

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.needed_bytes <= self.free_bytes

    def __str__(self) -> str:
        return (
            f"{self.slots} slots need {self.needed_bytes} more bytes, but {self.free_bytes} are free in "
            f"{self.folder.parent}"
        )

    def in_memory_instead(self) -> str:
        """For the user: that the slots are anonymous memory of the agent, and what a larger file system would add."""
        least_mib = math.ceil((self.total_bytes - self.free_bytes + self.needed_bytes) * _SPARE / 2**20)
        return (
            f"{self}: the agent holds them in anonymous memory, which only the memory of the machine or container "
            f"limits. There they survive the workers, but not the agent; in a larger {self.folder.parent} (--shm-size="
            f"{least_mib}m or more) they would survive the agent, too"
        )


def find_room(sizes: Mapping[Path, int], folder: Path) -> Room:
    """What files need, and what there is.

    Args:
        sizes: length that each file shall have, in bytes; those that exist count with what they have already.
        folder: where they lie.
    """
    # In this order: what another process makes in between is counted as free and as made, and never as missing. The
    # folder above is asked: a rank that was refused first may have removed the empty arena.
    disk = os.statvfs(folder.parent)
    needed_bytes = sum(max(0, file_bytes - taken_bytes(path)) for path, file_bytes in sizes.items())
    return Room(folder, len(sizes), needed_bytes, disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)
