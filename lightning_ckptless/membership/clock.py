"""The clock of a process, apart from what it times, because the simulation of recovery has its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """The time of an agent or a worker.

    Args:
        monotonic: returns seconds since an arbitrary instant; comparable within this node alone.
        wall: returns seconds since the epoch; comparable between nodes and with the times of processes.
        sleep: waits for a number of seconds.
    """

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
