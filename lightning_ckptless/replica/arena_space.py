"""Space for arenas: their default folder, the memory that their files occupy, and whether more fits."""

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
SPACE_FIX = (
    "enlarge the mount (docker run --shm-size=..., in Kubernetes a volume of `medium: Memory`, elsewhere mount -o "
    "remount,size=...), set arena_dir= to a larger file system, or keep fewer copies or a smaller state"
)
"""What to do if arenas do not fit."""
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs")
_SPARE = 1.1
"""Reserve for notes and for the host state of each rank, which is written after the tensor state."""
_BLOCK_BYTES = 512
"""Unit of `st_blocks`, independent of the file system."""


def default_arena_dir() -> Path:
    """Folder for arenas: the one set in the environment, shared memory, or with a warning the temporary folder."""
    if named := os.environ.get(environment.ARENA_DIR):
        return Path(named)
    if os.access(SHARED_MEMORY, os.W_OK | os.X_OK) and SHARED_MEMORY.is_mount():
        return SHARED_MEMORY
    fallback = _own_temporary_dir()
    warnings.warn(
        f"{SHARED_MEMORY} is not a writable memory file system: arenas are stored in {fallback}, where mirroring is "
        "slower. Set arena_dir= to choose another folder.",
        stacklevel=2,
    )
    return fallback


def _own_temporary_dir() -> Path:
    """A folder in the temporary folder, with the same name in every process of this user.

    Raises:
        ArenaError: another user has created a folder of this name, or may write to it.
    """
    folder = Path(tempfile.gettempdir()) / f"ckptless-arenas-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        require_private(folder)
    except OSError as error:
        raise ArenaError(
            f"{SHARED_MEMORY} is not a writable memory file system, and {folder} cannot be used instead: {error}: "
            "set arena_dir= (or CKPTLESS_ARENA_DIR) to your own folder"
        ) from error
    return folder


def is_in_memory(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a folder is in memory, so that its contents do not survive a reboot.

    Args:
        folder: the folder.
        mounts: the kernel's list of mounted file systems, the newest last.
    """
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    entries = [line.partition(" - ") for line in _lines(mounts)]
    kinds = {mount.split()[2]: kind.split()[0] for mount, separator, kind in entries if separator}
    return kinds.get(number) in _MEMORY_FILE_SYSTEMS


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def available_memory_bytes() -> int:
    """Memory that this process may still allocate. Beyond it the kernel kills processes instead of refusing."""
    left, group = int(psutil.virtual_memory().available), ceiling("memory")
    return left if group is None else min(left, group.left)


def taken_bytes(path: Path) -> int:
    """Memory that a file occupies; 0 if it does not exist."""
    try:
        return stat_file(path).st_blocks * _BLOCK_BYTES
    except FileNotFoundError:
        return 0


@dataclass(frozen=True, slots=True)
class SlotSpace:
    """The space that slots need and the space on their file system.

    Args:
        folder: folder of the slots.
        slots: number of slots.
        needed_bytes: space needed in addition to what existing slots occupy.
        free_bytes: free space on the file system.
        total_bytes: size of the file system.
    """

    folder: Path
    slots: int
    needed_bytes: int
    free_bytes: int
    total_bytes: int

    @property
    def fits(self) -> bool:
        """Whether there is enough space."""
        return self.needed_bytes <= self.free_bytes

    def __str__(self) -> str:
        return (
            f"{self.slots} slots need {self.needed_bytes} more bytes, but {self.free_bytes} are free in "
            f"{self.folder.parent}"
        )

    def in_memory_instead(self) -> str:
        """Message for the user: the agent holds the slots in anonymous memory, and what that means."""
        least_mib = math.ceil((self.total_bytes - self.free_bytes + self.needed_bytes) * _SPARE / 2**20)
        return (
            f"{self}: the agent holds them in anonymous memory, limited only by the memory of the machine or "
            f"container. There they survive the workers, but not the agent; in a larger {self.folder.parent} "
            f"(--shm-size={least_mib}m or more) they survive the agent, too"
        )


def measure_space(sizes: Mapping[Path, int], folder: Path) -> SlotSpace:
    """Compare the space that files need with the free space.

    Args:
        sizes: intended length of each file, in bytes; the space that existing files occupy is deducted.
        folder: folder of the files.
    """
    # The free space is read first: a file that another process creates in between is then counted as free and as
    # existing, never as missing. The parent folder is queried, because a rank that failed first may have removed the
    # empty arena.
    disk = os.statvfs(folder.parent)
    needed_bytes = sum(max(0, file_bytes - taken_bytes(path)) for path, file_bytes in sizes.items())
    return SlotSpace(folder, len(sizes), needed_bytes, disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)
