"""The control groups of a process: limits, usage, and out-of-memory kills.

| Version | 1 | 2 |
|---|---|---|
| Limit | `memory.limit_in_bytes`, `pids.max` | `memory.max`, `pids.max` |
| Usage | `memory.usage_in_bytes`, `pids.current` | `memory.current`, `pids.current` |
| Out-of-memory kills | `oom_kill` in `memory.oom_control` | `oom_kill` in `memory.events` |
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Resource = Literal["memory", "pids"]

PROC = Path("/proc/self")
_PRACTICALLY_UNLIMITED = 1 << 60
"""Version 1 represents "no limit" as a number near 2^63."""
_FILES = {
    # By resource and version: limit, usage, and a file that exists only if the group counts the resource.
    ("memory", 1): ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control"),
    ("memory", 2): ("memory.max", "memory.current", "memory.events"),
    ("pids", 1): ("pids.max", "pids.current", "pids.current"),
    ("pids", 2): ("pids.max", "pids.current", "pids.current"),
}


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The tightest limit of a process's control groups.

    Args:
        limit: limit in bytes or processes.
        used: usage without memory that the kernel can reclaim.
        group: folder of the control group.
    """

    limit: int
    used: int
    group: Path

    @property
    def left(self) -> int:
        """Remaining bytes or processes."""
        return max(0, self.limit - self.used)


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """The control group that counts a resource of a process.

    Args:
        resource: kind of resource.
        folder: folder of the group.
        mount: visible root of its hierarchy.
        version: version of control groups, 1 or 2.
    """

    resource: Resource
    folder: Path
    mount: Path
    version: int

    def ceilings(self) -> list[Ceiling]:
        """Return the limits of this group and of its parents."""
        limit_name, used_name, _ = _FILES[self.resource, self.version]
        found = []
        for folder in _up_to(self.mount, self.folder):
            with suppress(OSError, ValueError):
                limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
                if limit < _PRACTICALLY_UNLIMITED:
                    reclaimable = _reclaimable_bytes(folder) if self.resource == "memory" else 0
                    found.append(Ceiling(limit, max(0, used - reclaimable), folder))
        return found

    def kills(self) -> int:
        """Return the number of out-of-memory kills in this group."""
        return _number(self.folder / _FILES["memory", self.version][2], "oom_kill") or 0


def control_group(resource: Resource, proc: Path = PROC) -> ControlGroup | None:
    """Return the group that counts a resource of a process; None if there is none, or it is not visible.

    Args:
        resource: kind of resource.
        proc: folder of the process, e.g. `/proc/self`.
    """
    lines = [line.split(":", 2) for line in _read(proc / "cgroup").splitlines()]
    paths = {controller: line[2] for line in lines if len(line) == 3 for controller in line[1].split(",")}
    mounts = list(_mounts(proc))
    for version, controller, kind in ((1, resource, "cgroup"), (2, "", "cgroup2")):
        marker = _FILES[resource, version][2]
        for root, mount, found, options in mounts:
            if controller in paths and found == kind and (version == 2 or controller in options):
                path = paths[controller]
                # In a container, the path may be that of the host, of which only the mount is visible.
                folder = mount / os.path.relpath(path, root) if Path(path).is_relative_to(root) else mount
                # In version 2, a group need not count a resource that its parent counts.
                if counting := [near for near in _up_to(mount, folder) if (near / marker).exists()]:
                    return ControlGroup(resource, counting[0], mount, version)
    return None


def ceiling(resource: Resource, proc: Path = PROC) -> Ceiling | None:
    """Return the tightest limit of a process's control groups; None without a limit.

    Args:
        resource: kind of resource.
        proc: folder of the process.
    """
    group = control_group(resource, proc)
    return None if group is None else min(group.ceilings(), key=lambda limit: limit.left, default=None)


def _up_to(mount: Path, folder: Path) -> Iterator[Path]:
    return (near for near in (folder, *folder.parents) if near.is_relative_to(mount))


def _mounts(proc: Path) -> Iterator[tuple[str, Path, str, list[str]]]:
    """Yield root, mount point, type and options of the mounts that a process sees; see proc(5)."""
    for line in _read(proc / "mountinfo").splitlines():
        mount, _, source = line.partition(" - ")
        left, right = mount.split(), source.split()
        if len(left) > 4 and len(right) > 2:
            yield left[3], Path(left[4]), right[0], right[2].split(",")


def _reclaimable_bytes(group: Path) -> int:
    """Return the bytes of cached files that the kernel can reclaim."""
    stat = group / "memory.stat"
    total = _number(stat, "total_inactive_file")
    return total if total is not None else _number(stat, "inactive_file") or 0


def _number(path: Path, name: str) -> int | None:
    """Read a number from a file with a name and a number per line."""
    lines = [line.split() for line in _read(path).splitlines()]
    return next((int(line[1]) for line in lines if len(line) == 2 and line[0] == name and line[1].isdigit()), None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


class OomKills:
    """Reports out-of-memory kills in the control group of this process.

    Args:
        proc: folder of this process; None for `/proc/self`.
    """

    def __init__(self, proc: Path | None = None) -> None:
        self._group = control_group("memory", proc or PROC)
        self._first = self._last = self._kills()

    def news(self) -> str:
        """Describe the kills since this object was created; empty if there were none since the last call."""
        previous, self._last = self._last, self._kills()
        if self._last <= previous:
            return ""
        assert self._group is not None, "it has kills"
        count, limit_bytes = self._last - self._first, min((one.limit for one in self._group.ceilings()), default=None)
        limit = "no memory limit of its own" if limit_bytes is None else f"a limit of {limit_bytes / (1 << 20):.0f} MiB"
        return (
            f"the kernel has killed {count} process{'' if count == 1 else 'es'} in cgroup {self._group.folder} for "
            f"lack of memory since the start (oom_kill was {self._first}, is {self._last}); the cgroup has {limit}"
        )

    def _kills(self) -> int:
        return 0 if self._group is None else self._group.kills()
