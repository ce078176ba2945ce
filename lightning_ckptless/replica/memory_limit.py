"""How much memory this process may still take: what the machine has left, and what its control groups allow.

A container's memory limit is that of its control group. Beyond it the kernel kills processes and refuses nothing, so it
is looked at first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of the files in a control group."""

    limit: str
    taken: str
    reclaimable: str


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "inactive_file")


def available_memory_bytes(groups: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Memory that is left to this process.

    Args:
        groups: where control groups are mounted.
        membership: the kernel's list of the groups that this process is in.
    """
    left = [psutil.virtual_memory().available]
    for folder, names in _memory_groups(groups, membership):
        # Without a limit, or of the other version, or outside what a container sees.
        with suppress(OSError, ValueError):
            limit_bytes = int((folder / names.limit).read_text())
            taken_bytes = int((folder / names.taken).read_text()) - _reclaimable_bytes(folder, names)
            left.append(max(0, limit_bytes - taken_bytes))
    return min(left)


def _memory_groups(groups: Path, membership: Path) -> Iterator[tuple[Path, _Names]]:
    """The groups whose limits count: this process's own, and all above it."""
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            root, names = (groups, _V2) if not controllers else (groups / "memory", _V1)
            if controllers and "memory" not in controllers.split(","):
                continue
            path = Path(group.lstrip("/"))
            # A container sees its own group as the root, whatever the path says.
            yield from ((root / part, names) for part in (path, *path.parents))


def _reclaimable_bytes(folder: Path, names: _Names) -> int:
    """What of the taken memory is only a cache of files, which the kernel gives up first."""
    with suppress(OSError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == names.reclaimable:
                return int(value)
    return 0
