"""Control groups in a folder, with the files of `/proc/self` that lead to them."""

from __future__ import annotations

from pathlib import Path

V1_MOUNTS = """\
35 31 0:32 / {tmp}/pids rw,relatime - cgroup cgroup rw,pids
36 31 0:33 {root} {tmp}/memory rw,relatime - cgroup cgroup rw,memory
"""


def fill(folder: Path, **files: str) -> None:
    """Write files of a control group; a name has `__` for each dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def second_version(folder: Path, path: str = "/") -> Path:
    """A hierarchy of version 2 in `folder/cgroup`; returns what stands for `/proc/self`.

    Args:
        folder: for both.
        path: of the process's group in it.
    """
    mounts = f"garbage - \n31 23 0:28 / {folder / 'cgroup'} rw,relatime shared:4 - cgroup2 cgroup rw\n"
    fill(folder / "proc", cgroup=f"garbage\n0::{path}\n", mountinfo=mounts)
    fill(folder / "cgroup")
    return folder / "proc"


def first_version(folder: Path, root: str = "/") -> Path:
    """Hierarchies of version 1 in `folder/memory` and `folder/pids`; returns what stands for `/proc/self`.

    Args:
        folder: for all.
        root: what of the hierarchy of memory is mounted there; the process is in `/docker/abc`.
    """
    mounts = V1_MOUNTS.format(root=root, tmp=folder)
    fill(folder / "proc", cgroup="8:cpu,pids:/else\n4:memory:/docker/abc\n0::/docker/abc\n", mountinfo=mounts)
    return folder / "proc"


def limited_memory(folder: Path, *, kills: int, limit: str) -> Path:
    """A group of version 2 with a limit of memory and processes that were killed for it; returns `/proc/self`."""
    proc = second_version(folder)
    events = f"low 0\nhigh 0\nmax 3\noom {kills}\noom_kill {kills}\n"
    fill(folder / "cgroup", memory__events=events, memory__max=f"{limit}\n", memory__current="0\n")
    return proc
