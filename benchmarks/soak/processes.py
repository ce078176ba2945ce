"""Processes of this soak test: what may be harmed, CPU load, and a search for leaks after a run."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.harness.processes import busy_loops
from tests import leaks

GRACE_S = 10.0
"""Seconds for processes to exit."""


def mark() -> None:
    """Mark all processes that this one starts from now on."""
    os.environ.setdefault(leaks.MARK, f"soak-{os.getpid()}")


def is_descendant(pid: int) -> bool:
    """Return whether a process is a descendant of this one; only those may receive faults."""
    try:
        return any(parent.pid == os.getpid() for parent in psutil.Process(pid).parents())
    except psutil.NoSuchProcess:
        return False


def running() -> frozenset[int]:
    """Return the processes that this one has started, directly or not."""
    return frozenset(process.pid for process in leaks.marked_processes())


def left_over(kept: Collection[int]) -> list[str]:
    """Return the processes that a run has left behind, after a grace period; they are killed.

    Args:
        kept: process ids of those that may outlive a run.
    """
    new = [process for process in leaks.marked_processes() if process.pid not in kept]
    _, alive = psutil.wait_procs(new, timeout=GRACE_S) if new else ([], [])
    found = []
    for process in alive:
        try:
            found.append(f"process {process.pid} ({' '.join(process.cmdline())[-120:]})")
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return found


@cache
def _use_libuv() -> None:
    """Make libuv, on which torch's store runs, open the files that it opens once per process and keeps."""
    TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def open_files() -> Counter[str]:
    """Return the open files of this process, by target; all sockets are counted under one name."""
    _use_libuv()
    gc.collect()
    return Counter(target.split(":[")[0] for target in leaks.open_files().values())


@contextmanager
def busy_cores(wanted: bool) -> Iterator[None]:
    """Keep all cores busy while the block runs, if that is wanted."""
    with busy_loops((os.cpu_count() or 1) if wanted else 0):
        yield
