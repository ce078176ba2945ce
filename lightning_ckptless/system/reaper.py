"""Removes a folder when a process has ended: for runs under an agent that knows nothing of arenas, such as torchrun.

Run as a file, without site packages, so that it costs next to nothing: `python -S -I reaper.py PID FOLDER`. It waits
for the process to end; if the folder then holds the marker `finished`, the folder is removed. A folder without the
marker belongs to a run that may come back, and stays.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys

MARKER = "finished"


def start_reaper(pid: int, folder: str) -> None:
    """Start a reaper that outlives this process.

    Args:
        pid: process whose end it waits for.
        folder: what it removes then, if the folder holds a file named `finished`.
    """
    # The process between ends at once, so that nobody here has to wait for the reaper, which init adopts.
    subprocess.run(
        [sys.executable, "-S", "-I", os.path.abspath(__file__), str(pid), folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
    )


def reap(pid: int, folder: str) -> bool:
    """Wait until a process has ended, then remove a finished folder. Returns whether it was removed."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        pass  # it has ended before
    else:
        select.select([pidfd], [], [])
        os.close(pidfd)
    if not os.path.exists(os.path.join(folder, MARKER)):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


def main(arguments: list[str]) -> None:
    """Wait in a process of its own."""
    pid, folder = int(arguments[0]), arguments[1]
    os.chdir("/")
    if os.fork() == 0:
        reap(pid, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
