"""Processes of this soak test: identification, CPU load, and a search for leaked ones after a run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

MARK = "CKPTLESS_SOAK"
"""Variable that every process started by a soak test inherits."""
GRACE_S = 10.0
"""Seconds for processes to exit."""

_BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""


def mark() -> None:
    """Mark all processes that this one starts from now on."""
    os.environ.setdefault(MARK, f"{os.getpid()}")


def is_descendant(pid: int) -> bool:
    """Return whether a process is a descendant of this one; only those may receive faults."""
    try:
        return any(parent.pid == os.getpid() for parent in psutil.Process(pid).parents())
    except psutil.NoSuchProcess:
        return False


def ours() -> Iterator[psutil.Process]:
    """Yield the live processes that this soak test started, including orphans."""
    marked = f"{MARK}={os.environ[MARK]}".encode()
    for pid in psutil.pids():
        if pid != os.getpid() and marked in _environment(pid):
            try:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except psutil.NoSuchProcess:
                continue


def _environment(pid: int) -> list[bytes]:
    try:
        return Path("/proc", str(pid), "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def left_over(kept: Collection[int]) -> list[str]:
    """Return the processes that a run has left behind, after a grace period; they are killed.

    Args:
        kept: process ids of those that may outlive a run.
    """
    new = [process for process in ours() if process.pid not in kept]
    _, alive = psutil.wait_procs(new, timeout=GRACE_S) if new else ([], [])
    found = []
    for process in alive:
        try:
            found.append(f"process {process.pid} ({' '.join(process.cmdline())[-120:]})")
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return found


@contextmanager
def busy_cores(wanted: bool) -> Iterator[None]:
    """Keep all cores busy while the block runs.

    Args:
        wanted: False to do nothing.
    """
    count = (os.cpu_count() or 1) if wanted else 0
    loops = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
