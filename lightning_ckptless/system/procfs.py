"""Reads the state of processes and threads from /proc; see `stat` in proc(5)."""

from __future__ import annotations

from pathlib import Path

import psutil


def stat_fields(pid: int, thread_id: int | None = None) -> list[str] | None:
    """Return the fields of `stat` from the state onwards; None if the process or thread has exited.

    Args:
        pid: process id.
        thread_id: id of one of its threads; None for the process.
    """
    folder = Path("/proc", str(pid)) if thread_id is None else Path("/proc", str(pid), "task", str(thread_id))
    try:
        # The name before the state is in parentheses, and may contain spaces and parentheses.
        return (folder / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def used_s(pid: int) -> float:
    """Return the CPU time of a process and its descendants, in seconds; 0 if it has exited."""
    try:
        process = psutil.Process(pid)
        return sum(sum(one.cpu_times()[:4]) for one in (process, *process.children(recursive=True)))
    except psutil.Error:
        return 0.0
