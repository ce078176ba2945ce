"""What the control groups of this process allow: in a container, its limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Resource = Literal["memory", "pids"]

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_PRACTICALLY_UNLIMITED = 1 << 60
"""What the first version of control groups says where nothing is limited is near 2^63."""
_NAMES = {
    # By resource: what the second version of control groups calls limit and use, then the first.
    "memory": (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    "pids": (("pids.max", "pids.current"), ("pids.max", "pids.current")),
}


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The limit of a control group that leaves least room.

    Args:
        limit: in bytes or processes.
        used: of it, without what the kernel can take back.
        group: folder of the control group.
    """

    limit: int
    used: int
    group: Path

    @property
    def room(self) -> int:
        """What is left."""
        return max(0, self.limit - self.used)


def ceiling(kind: Resource, root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> Ceiling | None:
    """The tightest limit of this process's control groups; None where there is none.

    Args:
        kind: of the limit.
        root: where control groups are mounted.
        membership: the kernel's list of this process's groups.
    """
    found = [limit for group in _groups(kind, root, membership) if (limit := _ceiling_of(kind, group)) is not None]
    return min(found, key=lambda limit: limit.room, default=None)


def _groups(kind: Resource, root: Path, membership: Path) -> Iterator[Path]:
    """The folders of this process's groups and of those around them."""
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and kind not in controllers.split(","):
                continue
            for mount in (root / controllers, root / kind) if controllers else (root, root / "unified"):
                group = mount / path.lstrip("/")
                # In a container the path may be that of the host, of which only the mount is to be seen.
                yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _ceiling_of(kind: Resource, group: Path) -> Ceiling | None:
    for limit_name, used_name in _NAMES[kind]:
        with suppress(OSError, ValueError):
            limit, used = (int((group / name).read_text()) for name in (limit_name, used_name))
            if limit < _PRACTICALLY_UNLIMITED:
                return Ceiling(limit, max(0, used - (_reclaimable(group) if kind == "memory" else 0)), group)
    return None


def _reclaimable(group: Path) -> int:
    """Bytes of files that the kernel keeps in memory as long as nothing else needs it."""
    with suppress(OSError, ValueError):
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(facts.get("total_inactive_file", facts.get("inactive_file", "0")))
    return 0
