"""The clock of a node, for the parts of its agent. Apart from them, because the recovery simulation has its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """The time of a node.

    Args:
        monotonic: returns seconds since an arbitrary instant; comparable within this node alone.
        wall: returns seconds since the epoch; comparable between nodes and with the times of processes.
    """

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
