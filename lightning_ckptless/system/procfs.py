"""What the kernel shows of a process, or of one of its threads: the fields of `stat` in proc(5)."""

from __future__ import annotations

from pathlib import Path

import psutil


def stat_fields(pid: int, thread_id: int | None = None) -> list[str] | None:
    """The fields from the state on; None where the process or the thread is gone.

    Args:
        pid: process id.
        thread_id: of one of its threads; None for the process as a whole.
    """
    folder = Path("/proc", str(pid)) if thread_id is None else Path("/proc", str(pid), "task", str(thread_id))
    try:
        # The name before the state stands in brackets, and may have spaces and brackets in it.
        return (folder / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def used_s(pid: int) -> float:
    """Processor time that a process has used, with all its children, in seconds; 0 where it is gone."""
    try:
        process = psutil.Process(pid)
        return sum(sum(one.cpu_times()[:4]) for one in (process, *process.children(recursive=True)))
    except psutil.Error:
        return 0.0
