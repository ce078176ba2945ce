"""Record the workers' state shortly before a run misses its deadline; afterwards they no longer exist."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.soak.processes import is_descendant
from benchmarks.soak.watching import Watch
from lightning_ckptless.membership.worker.progress import STACKS_SIGNAL

BEFORE_S = 10.0
"""Seconds before the deadline at which the state is recorded."""
WRITE_S = 3.0
"""Seconds in which they write their stacks."""


@contextmanager
def dump_before(deadline_s: float, watch: Watch, temporary: Path, into: Path) -> Iterator[None]:
    """Record the state of the workers shortly before a deadline, unless the block ends earlier.

    Args:
        deadline_s: seconds from now.
        watch: watch on the run, which knows the workers.
        temporary: folder of the agent's temporary files, where workers write their stacks.
        into: folder that receives stacks, and the state of every thread.
    """
    timer = threading.Timer(deadline_s - BEFORE_S, lambda: dump(watch, temporary, into))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def dump(watch: Watch, temporary: Path, into: Path) -> None:
    """Record the state of the workers; the arguments are those of `dump_before`."""
    into.mkdir(parents=True, exist_ok=True)
    workers = {rank: pid for rank, pid in watch.look().pids.items() if is_descendant(pid)}
    for rank, pid in workers.items():
        (into / f"rank{rank}-pid{pid}.txt").write_text("\n".join(_threads(pid)) + "\n")
        # Without a handler the signal would end the process.
        if _handles_stacks(pid):
            os.kill(pid, STACKS_SIGNAL)
    threading.Event().wait(WRITE_S)
    for path in temporary.glob("ckptless-scratch-agent-*/*"):
        with suppress(OSError):
            shutil.copy(path, into / path.name)


def _handles_stacks(pid: int) -> bool:
    with suppress(OSError):
        for line in Path("/proc", str(pid), "status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1)
    return False


def _threads(pid: int) -> list[str]:
    """Return the name, state and kernel wait channel of each thread."""
    found = []
    for task in sorted(Path("/proc", str(pid), "task").glob("*")):
        with suppress(OSError):
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            found.append(f"{task.name} {(task / 'comm').read_text().strip()} {state} {(task / 'wchan').read_text()}")
    return found
