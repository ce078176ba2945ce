"""Threads of this process that are stuck in a collective forever.

When a connection ends, gloo (2026-04) fails the operations that are queued on it, but neither the one whose payload is
partly received nor those whose payload is partly sent or refused (`Pair::signalException` in `transport/tcp/pair.cc`
handles neither `rx_` nor the unbound buffers of `tx_`):

    a thread of the process             gloo's reading thread                      the connection
    send: the pipe is full or broken
          is queued in `tx_`
    wait until it is sent                                                          is aborted, or the peer dies
                                        reads the end, fails what is queued
                                        closes
    waits forever

No call of torch frees such a thread before the timeout of its group, which is half an hour. `connections.py` ensures
that no rank does this to another one, but a rank that died, or a full pipe, still may. So the process is killed and
replaced like a lost one. A thread is certainly stuck once every connection is closed, and it has slept inside torch
without using CPU time since. A thread that waits for a vote in shared memory is always woken.
"""

from __future__ import annotations

import os
import sys
import threading

from lightning_ckptless.membership.worker.stuck_evidence import python_threads
from lightning_ckptless.protocol.hang_detection import SleepingThread, find_stuck_collective, unchanged_since
from lightning_ckptless.system.procfs import stat_fields

_WAITS_IN_TORCH = (
    "torch._ops",
    "torch.autograd.graph",
    "torch.distributed",
    "torch.nn.parallel",
    "lightning_ckptless.replica.transport",
)
"""Modules whose functions sleep in torch code only to wait for other ranks."""
_WAITS_IN_SHARED_MEMORY = "lightning_ckptless.system.futex"
_MEETS_PEERS = "lightning_ckptless.membership.rendezvous.generation"
_WAITS_FOR_THE_STORE = "torch.distributed.rendezvous"
"""A wait that ends once a slow server answers: not a wait for another rank."""


class StuckCollectives:
    """Watches the threads of this process for one that is stuck in a collective."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[SleepingThread, float]] = {}

    def poll(self, connections: int, now: float) -> str | None:
        """Check all threads; returns which of them is stuck, in a sentence.

        Args:
            connections: number of remaining connections to other ranks.
            now: time of any clock, in seconds.
        """
        self._since = unchanged_since(self._since, {} if connections else _sleeping_threads(_WAITS_IN_TORCH), now)
        return find_stuck_collective(self._since, now)


def main_thread_waits() -> bool:
    """Whether the main thread is waiting for other ranks, asleep or between two polls of the store."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_globals.get("__name__") == _MEETS_PEERS:
            return True
        frame = frame.f_back
    return os.getpid() in _sleeping_threads((*_WAITS_IN_TORCH, _WAITS_IN_SHARED_MEMORY))


def _sleeping_threads(modules: tuple[str, ...]) -> dict[int, SleepingThread]:
    """Return where threads sleep in one of these modules, by thread id."""
    found = {}
    for number, thread, frame in python_threads():
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith(modules) or module == _WAITS_FOR_THE_STORE:
            continue
        fields = stat_fields(os.getpid(), number)
        if fields is not None and fields[0] == "S":
            used_ticks = int(fields[11]) + int(fields[12])
            found[number] = SleepingThread(thread.name, f"{module}.{frame.f_code.co_name}", used_ticks)
    return found
