"""The processes that the kernel has killed for lack of memory, as the cgroup of this process counts them.

A worker that the kernel kills so dies by SIGKILL, as one does that a user kills. Only the cgroup tells them apart.

| Version | Kills | Limit |
|---|---|---|
| 1 | `oom_kill` in `memory.oom_control` | `hierarchical_memory_limit` in `memory.stat` |
| 2 | `oom_kill` in `memory.events` | least `memory.max` of the cgroup and those above it |
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/self")
_NO_LIMIT_BYTES = 1 << 62
"""Version 1 has no word for "no limit", but a number larger than any memory."""


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """The cgroup that counts the memory of a process.

    Args:
        folder: its files.
        mount: root of its hierarchy, as far as it is visible.
        is_unified: whether it is of version 2.
    """

    folder: Path
    mount: Path
    is_unified: bool

    def kills(self) -> int | None:
        """How many of its processes were killed for lack of memory; None where the kernel does not say."""
        return _number(self.folder / ("memory.events" if self.is_unified else "memory.oom_control"), "oom_kill")

    def limit_bytes(self) -> int | None:
        """How much memory its processes may use together; None for no limit."""
        if not self.is_unified:
            limit = _number(self.folder / "memory.stat", "hierarchical_memory_limit")
            return None if limit is None or limit >= _NO_LIMIT_BYTES else limit
        folders = [self.folder, *self.folder.parents]
        texts = [_read(folder / "memory.max").strip() for folder in folders if folder.is_relative_to(self.mount)]
        return min((int(text) for text in texts if text.isdigit()), default=None)

    def __str__(self) -> str:
        return str(self.folder)


def memory_cgroup(proc: Path) -> MemoryCgroup | None:
    """The cgroup that counts the memory of a process; None where there is none, or it is not visible.

    Args:
        proc: folder of the process, e.g. `/proc/self`.
    """
    lines = [line.split(":", 2) for line in _read(proc / "cgroup").splitlines()]
    paths = {controller: line[2] for line in lines if len(line) == 3 for controller in line[1].split(",")}
    mounts = list(_mounts(proc))
    for name, kind in (("memory", "cgroup"), ("", "cgroup2")):
        for root, mount, found, options in mounts:
            if name in paths and found == kind and (not name or name in options):
                folder = mount / os.path.relpath(paths[name], root) if _is_within(paths[name], root) else mount
                cgroup = MemoryCgroup(folder, mount, is_unified=not name)
                if cgroup.kills() is not None:
                    return cgroup
    return None


class OomKills:
    """Tells when the kernel has killed processes of this one's cgroup for lack of memory.

    Args:
        proc: folder of this process; None for the real one.
    """

    def __init__(self, proc: Path | None = None) -> None:
        self._cgroup = memory_cgroup(proc or PROC)
        self._first = self._last = self._kills()

    def news(self) -> str:
        """How many it has killed since this object was made, in words; empty where none since the last call."""
        before, self._last = self._last, self._kills()
        if self._last <= before:
            return ""
        assert self._cgroup is not None, "it has kills"
        count, limit_bytes = self._last - self._first, self._cgroup.limit_bytes()
        limit = "has no limit of its own" if limit_bytes is None else f"is limited to {limit_bytes / (1 << 20):.0f} MiB"
        return (
            f"the kernel has killed {count} process(es) of cgroup {self._cgroup} for lack of memory since the start "
            f"(oom_kill was {self._first}, is {self._last}); its memory {limit}"
        )

    def _kills(self) -> int:
        return 0 if self._cgroup is None else self._cgroup.kills() or 0


def _mounts(proc: Path) -> Iterator[tuple[str, Path, str, list[str]]]:
    """Root, mount point, kind and options of the mounts that a process sees; see proc(5)."""
    for line in _read(proc / "mountinfo").splitlines():
        place, _, source = line.partition(" - ")
        left, right = place.split(), source.split()
        if len(left) > 4 and len(right) > 2:
            yield left[3], Path(left[4]), right[0], right[2].split(",")


def _is_within(path: str, root: str) -> bool:
    return Path(path).is_relative_to(root)


def _number(path: Path, name: str) -> int | None:
    """The number in a file of lines with a name and a number each."""
    lines = [line.split() for line in _read(path).splitlines()]
    return next((int(line[1]) for line in lines if len(line) == 2 and line[0] == name and line[1].isdigit()), None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
