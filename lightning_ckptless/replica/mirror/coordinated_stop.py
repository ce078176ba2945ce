"""Where all ranks end a run of which one was asked to end: at the same moment, the next that none has passed yet.

    training thread                     mirror thread
    passes a moment: count it
                                        a round tells that a rank was asked to end
                                        from here on the training thread waits at its next moment
                                        meet: how many has each rank passed?
    one more than any has: end there
    fewer: go on to the next

The threads that train are not at the same moment when the round ends, so the word alone would stop them at different
ones, each waiting for the others for ever. Nobody waits for the training thread of another rank here: those that mirror
meet, and all of them have had that round.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future


class Ending:
    """One rank's part in it, for as long as its mirror lives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._passed = 0
        self._last: Future[int] | None = None

    @property
    def is_agreed(self) -> bool:
        """Whether the ranks have met."""
        return self._last is not None

    def passes(self) -> bool:
        """A moment at which the run may end, in the training thread. All ranks have the same ones, in the same order.

        Returns:
            Whether it ends there.

        Raises:
            TransportError: a peer is gone while the ranks meet.
        """
        with self._lock:
            self._passed += self._last is None
            last = self._last
        if last is None:
            return False
        number = last.result()
        self._passed += 1
        return self._passed >= number

    def agree(self, gather: Callable[[bytes], list[bytes]]) -> None:
        """Meet the others, in the thread of the mirror.

        Args:
            gather: what all ranks say, of a transport.

        Raises:
            TransportError: a peer is gone.
        """
        with self._lock:
            last = self._last = Future()
            passed = self._passed
        try:
            last.set_result(1 + max(int(line) for line in gather(str(passed).encode())))
        except BaseException as error:
            last.set_exception(error)
            raise
