"""Coordinated stop: after one rank was asked to stop, all ranks stop at the same point, the next that none has passed.

A rank is asked to stop because the run ends, or because it hands its rank over to another process. All ranks learn the
purpose from the round; if both are asked for in the same round, the run ends. A decision on a rewind has a stop of its
own.

    training thread                     mirror thread
    passes a stopping point: count it
                                        the result of a round says that a rank was asked to stop
                                        from now on the training thread blocks at its next stopping point
                                        gather how many stopping points each rank has passed
    maximum + 1 reached: stop there
    below: continue to the next

The training threads are at different points when the round ends. Stopping right away would stop them at different
points, where they would wait for each other forever. No rank waits for the training thread of another rank: the gather
runs in the mirror threads, and all of them have completed that round.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from enum import Enum, auto


class StopPurpose(Enum):
    """Why all ranks stop at the same point."""

    END = auto()
    """The run ends."""
    HAND_OVER = auto()
    """At least one rank is handed over to another process, and the run continues."""


class CoordinatedStop:
    """One rank's part in a coordinated stop. It exists as long as the rank's mirror.

    Attributes:
        purpose: why the ranks stop; None until they have agreed to, and for a stop that has only one purpose.
    """

    def __init__(self) -> None:
        self.purpose: StopPurpose | None = None
        self._lock = threading.Lock()
        self._passed = 0
        self._last: Future[int] | None = None

    @property
    def is_agreed(self) -> bool:
        """Whether the ranks have agreed on the stopping point, or are about to."""
        return self._last is not None

    def passes(self) -> bool:
        """Pass a stopping point, in the training thread. All ranks pass the same points in the same order.

        Returns:
            Whether the run stops here.

        Raises:
            TransportError: a peer was lost during the agreement.
        """
        with self._lock:
            self._passed += self._last is None
            last = self._last
        if last is None:
            return False
        number = last.result()
        self._passed += 1
        return self._passed >= number

    def agree(self, gather: Callable[[bytes], list[bytes]], purpose: StopPurpose | None = None) -> None:
        """Agree on the stopping point, in the mirror thread.

        Args:
            gather: `gather` of the mirror's transport.
            purpose: why the ranks stop, the same on all of them; None for a stop that has only one purpose.

        Raises:
            TransportError: a peer is lost.
        """
        with self._lock:
            last = self._last = Future()
            self.purpose = purpose
            passed = self._passed
        try:
            last.set_result(1 + max(int(payload) for payload in gather(str(passed).encode())))
        except BaseException as error:
            last.set_exception(error)
            raise
