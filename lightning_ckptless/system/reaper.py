"""Removes a folder after a process has exited, for runs under an agent that does not manage arenas, such as torchrun.

Runs as a script without site packages, so that it uses few resources: `python -S -I reaper.py PID FOLDER`. It waits for
the process to exit and removes the folder if it contains the marker `finished`. A folder without the marker is kept, as
its run may be restarted.
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
        pid: process to wait for.
        folder: folder to remove if it then contains a file named `finished`.
    """
    # The intermediate process exits at once and init adopts the reaper, so that this process need not wait for it.
    subprocess.run(
        [sys.executable, "-S", "-I", os.path.abspath(__file__), str(pid), folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
    )


def reap(pid: int, folder: str) -> bool:
    """Wait until a process has exited, then remove a finished folder; returns whether it was removed."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        pass  # already exited
    else:
        select.select([pidfd], [], [])
        os.close(pidfd)
    if not os.path.exists(os.path.join(folder, MARKER)):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


def main(arguments: list[str]) -> None:
    """Start the reaper in a background process."""
    pid, folder = int(arguments[0]), arguments[1]
    os.chdir("/")
    if os.fork() == 0:
        reap(pid, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
