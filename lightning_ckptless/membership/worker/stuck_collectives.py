"""Threads of this process that wait in a collective which nothing will end any more.

When a connection ends, gloo (2026-04) fails the operations that wait for their turn on it, but neither the one whose
payload is half received nor those whose payload is half sent or refused (`Pair::signalException` in
`transport/tcp/pair.cc` looks at neither `rx_` nor the unbound buffers of `tx_`):

    a thread of the process             the thread of gloo that reads              the connection
    send: the pipe is full, or broken
          is put into `tx_`
    wait until it is sent                                                          is cut, or its peer dies
                                        reads the end, fails what waits its turn
                                        closes
    waits for ever

No call of torch frees such a thread before the time-out of its group, which is half an hour. `connections.py` sees to
it that no rank does this to another one; who has died, or a pipe that is full, still may. So its process is given up
and replaced, as a lost one is. That is certain once every connection is gone, and the thread sleeps inside torch and
has used no processor time since.
"""

from __future__ import annotations

import os
import sys
import threading

from lightning_ckptless.membership.worker.stuck_evidence import python_threads
from lightning_ckptless.protocol.hang_detection import Stand, find_stuck_collective, unchanged_since
from lightning_ckptless.system.procfs import stat_fields

_WAITS_FOR_PEERS = (
    "torch._ops",
    "torch.autograd.graph",
    "torch.distributed",
    "torch.nn.parallel",
    "lightning_ckptless.replica.transport",
)
"""Modules whose functions sleep only for the sake of other ranks."""
_MEETS_PEERS = "lightning_ckptless.membership.rendezvous.generation"
_WAITS_FOR_THE_STORE = "torch.distributed.rendezvous"
"""A server that is slow to answer ends this wait by itself: it is no wait for another rank."""


class StuckCollectives:
    """Looks at the threads of this process, again and again."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[Stand, float]] = {}

    def look(self, connections: int, now: float) -> str | None:
        """Look at all threads; returns which of them waits for ever, in a sentence.

        Args:
            connections: to other ranks, that are still there.
            now: seconds of any clock.
        """
        self._since = unchanged_since(self._since, {} if connections else _stands(), now)
        return find_stuck_collective(self._since, now)


def main_thread_waits() -> bool:
    """Whether the main thread waits for other ranks at this moment, asleep or between two looks at the store."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_globals.get("__name__") == _MEETS_PEERS:
            return True
        frame = frame.f_back
    return os.getpid() in _stands()


def _stands() -> dict[int, Stand]:
    """Where the threads sleep that sleep in one of those modules, by their number in the system."""
    found = {}
    for number, thread, frame in python_threads():
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith(_WAITS_FOR_PEERS) or module == _WAITS_FOR_THE_STORE:
            continue
        fields = stat_fields(os.getpid(), number)
        if fields is not None and fields[0] == "S":
            used_ticks = int(fields[11]) + int(fields[12])
            found[number] = Stand(thread.name, f"{module}.{frame.f_code.co_name}", used_ticks)
    return found
