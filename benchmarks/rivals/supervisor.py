"""Start the processes of a rival's job, and restart lost ones immediately if the rival expects that.

`python -m benchmarks.rivals.supervisor [OPTIONS OF THE JOB]`
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import psutil

from benchmarks.jobs.job import JobOptions

LOOPBACK = "127.0.0.1"
GROUP_PORT = "GROUP_PORT"
"""Environment variable with the port for the ranks' process group; the rival uses another one."""
END_S = 10.0
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of orphaned descendants, so that they can be found when it is ended."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def supervise(words: list[str], ranks: int, env: Mapping[str, str], *, again: bool) -> None:
    """Run one process per rank until all have exited; kill all of them if interrupted.

    Each receives `RANK` and `WORLD_SIZE`. With `again`, one that has exited is restarted, whatever its exit code.
    """
    running: dict[int, int] = {}

    def start(rank: int) -> None:
        own = {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        running[os.spawnve(os.P_NOWAIT, words[0], words, {**os.environ, **env, **own})] = rank

    try:
        for rank in range(ranks):
            start(rank)
        while running:
            pid, _ = os.wait()
            rank = running.pop(pid, -1)
            if again and rank >= 0:
                start(rank)
    finally:
        left = psutil.Process().children(recursive=True)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, END_S)


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def lighthouse(ranks: int) -> Iterator[str]:
    """Run torchft's coordinator with the fastest failure detection that its options allow. Yields its address."""
    from torchft.coordination import LighthouseServer  # noqa: PLC0415 - installed for one of the two rivals

    server = LighthouseServer(
        bind=f"{LOOPBACK}:0", min_replicas=ranks, join_timeout_ms=1000, quorum_tick_ms=10, heartbeat_timeout_ms=500
    )
    try:
        yield server.address()
    finally:
        server.shutdown()


def main() -> None:
    """Supervise the job of a rival until it ends or this process is terminated."""
    options = JobOptions.from_arguments()
    ranks, words = options.devices, [sys.executable, "-m", "benchmarks.jobs.job", *options.to_arguments()]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    adopt_orphans()
    if options.strategy == "torchft":
        with lighthouse(ranks) as address:
            supervise(words, ranks, {"TORCHFT_LIGHTHOUSE": address}, again=True)
    else:
        env = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port()), GROUP_PORT: str(free_port())}
        supervise(words, ranks + 1, env, again=False)


if __name__ == "__main__":
    main()
