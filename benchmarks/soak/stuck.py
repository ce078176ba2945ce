"""What the workers of a run do that is about to miss its deadline: afterwards they are gone, and nothing tells why."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from benchmarks.soak.processes import is_descendant
from benchmarks.soak.watching import Watch
from lightning_ckptless.membership.worker.progress import STACKS_SIGNAL

BEFORE_S = 10.0
"""How long before the deadline workers are looked at."""
WRITE_S = 3.0
"""In which they write down their stacks."""


@contextmanager
def looked_at_before(deadline_s: float, watch: Watch, temporary: Path, into: Path) -> Iterator[None]:
    """Look at the workers shortly before a deadline, unless the block ends earlier.

    Args:
        deadline_s: from now.
        watch: knows the workers.
        temporary: folder of the agent's temporary files, where workers write their stacks.
        into: folder that receives stacks, and the state of every thread.
    """
    timer = threading.Timer(deadline_s - BEFORE_S, lambda: look(watch, temporary, into))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def look(watch: Watch, temporary: Path, into: Path) -> None:
    """Write down what workers do; the arguments are those of `looked_at_before`."""
    into.mkdir(parents=True, exist_ok=True)
    workers = {rank: pid for rank, pid in watch.look().pids.items() if is_descendant(pid)}
    for rank, pid in workers.items():
        (into / f"rank{rank}-pid{pid}.txt").write_text("\n".join(_threads(pid) + _connections(pid)) + "\n")
        # Without a handler the signal would end the process, and with it what is to be seen.
        if _handles_stacks(pid):
            os.kill(pid, STACKS_SIGNAL)
    threading.Event().wait(WRITE_S)
    for path in temporary.glob("ckptless-verdicts-*/*"):
        with suppress(OSError):
            shutil.copy(path, into / path.name)


def _handles_stacks(pid: int) -> bool:
    with suppress(OSError):
        for line in Path("/proc", str(pid), "status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1)
    return False


def _threads(pid: int) -> list[str]:
    """Name, state and place in the kernel of each thread."""
    found = []
    for task in sorted(Path("/proc", str(pid), "task").glob("*")):
        with suppress(OSError):
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            found.append(f"{task.name} {(task / 'comm').read_text().strip()} {state} {(task / 'wchan').read_text()}")
    return found


def _connections(pid: int) -> list[str]:
    with suppress(psutil.Error):
        return [str(connection) for connection in psutil.Process(pid).net_connections()]
    return []
