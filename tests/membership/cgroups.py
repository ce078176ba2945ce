"""A cgroup in a folder, with the files of `/proc/self` that lead to it."""

from __future__ import annotations

from pathlib import Path


def fake_cgroup(folder: Path, *, kills: int, limit: str) -> Path:
    """A cgroup of version 2 in `folder/cgroup`; returns the folder that stands for `/proc/self`."""
    cgroup, proc = folder / "cgroup", folder / "proc"
    for made in (cgroup, proc):
        made.mkdir()
    (cgroup / "memory.events").write_text(f"low 0\nhigh 0\nmax 3\noom {kills}\noom_kill {kills}\n")
    (cgroup / "memory.max").write_text(f"{limit}\n")
    (proc / "cgroup").write_text("0::/\n")
    (proc / "mountinfo").write_text(f"31 23 0:28 / {cgroup} rw,relatime shared:4 - cgroup2 cgroup rw\n")
    return proc
