"""What a restored version lacks is filled in while training goes on with the first step behind it.

Nothing is written over a restored version before all its copies are in place, so the first new version waits for them.
Until then a second loss is judged as any other: by the copies that are there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import perf_counter

from lightning_ckptless.errors import CkptlessError, ProtocolError, let_go

log = logging.getLogger(__name__)


class Rereplication:
    """Work on copies, in a thread of its own.

    Args:
        work: fills in what is missing; has the ranks' transport for itself until it is done.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: Exception | None = None
        self._is_done = False
        self._thread = threading.Thread(target=self._run, name="ckptless-protecting", daemon=True)
        self._thread.start()

    def wait(self) -> float:
        """Wait until all copies are in place.

        Returns:
            Seconds waited.

        Raises:
            StateMissingError: the last copy of a shard was damaged after the restore.
            ArenaError: the copies do not fit.
            TransportError: a peer is gone.
            ProtocolError: anything else, which the thread has told on stderr.
        """
        began_at = perf_counter()
        self._thread.join()
        if self._error is not None:
            raise self._error
        if not self._is_done:
            raise ProtocolError("copies that a restored version lacks were not filled in: see the traceback above")
        return perf_counter() - began_at

    def abandon(self, timeout_s: float) -> None:
        """Leave it as it is: the ranks' connections are cut.

        Args:
            timeout_s: longest wait. A thread that a peer keeps waiting for longer ends with the process.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("ckptless: after %g s the filling in of copies is left behind", timeout_s)
        let_go(self._error)

    def _run(self) -> None:
        try:
            self._work()
            self._is_done = True
        except (CkptlessError, RuntimeError) as error:
            self._error = error
