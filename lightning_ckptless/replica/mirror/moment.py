"""A moment that one thread reaches and others wait for.

A future does the same, with a condition and three locks: it takes several times as long to create and to use, and each
version has two moments.
"""

from __future__ import annotations

from threading import Lock


class Moment:
    """A moment.

    Attributes:
        is_reached: whether it has been reached.
        error: what those who wait for it raise; None for nothing.
    """

    def __init__(self) -> None:
        self.is_reached = False
        self.error: BaseException | None = None
        self._lock = Lock()
        self._lock.acquire()

    def reach(self, error: BaseException | None = None) -> None:
        """Wake those who wait. Called once.

        Args:
            error: what they raise; None for nothing.
        """
        self.error, self.is_reached = error, True
        self._lock.release()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the moment is reached.

        Args:
            timeout_s: longest wait, in seconds; None for no limit.

        Raises:
            TimeoutError: it was not reached in time.
        """
        if not self.is_reached:
            if not self._lock.acquire(timeout=-1 if timeout_s is None else timeout_s):
                raise TimeoutError(f"not reached within {timeout_s} s")
            self._lock.release()
        if self.error is not None:
            raise self.error
