"""Rereplication of a restored version in the background, while training resumes with the next step.

A restored version is not overwritten before all its replicas are in place, so the first new version waits for them. A
second fault before that is handled like any other, with the replicas that exist.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import perf_counter

from lightning_ckptless.errors import CkptlessError, ProtocolError, let_go

log = logging.getLogger(__name__)


class Rereplication:
    """Makes missing replicas in a separate thread.

    Args:
        work: makes the replicas; has exclusive use of the ranks' transport until it is done.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: Exception | None = None
        self._is_done = False
        self._thread = threading.Thread(target=self._run, name="ckptless-rereplication", daemon=True)
        self._thread.start()

    def wait(self) -> float:
        """Wait until all replicas are in place.

        Returns:
            Seconds waited.

        Raises:
            StateMissingError: the last replica of a shard was damaged after the restore.
            ArenaError: the replicas do not fit into the arena.
            TransportError: a peer was lost.
            ProtocolError: any other failure, which the thread has printed to stderr.
        """
        began_at = perf_counter()
        self._thread.join()
        if self._error is not None:
            raise self._error
        if not self._is_done:
            raise ProtocolError("the replicas that a restored version lacks were not made: see the traceback above")
        return perf_counter() - began_at

    def abandon(self, timeout_s: float) -> None:
        """Abandon the work: the ranks' connections have been aborted.

        Args:
            timeout_s: longest wait in seconds. A thread that is blocked for longer ends with the process.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("ckptless: rereplication is still blocked after %g s and is abandoned", timeout_s)
        let_go(self._error)

    def _run(self) -> None:
        try:
            self._work()
            self._is_done = True
        except (CkptlessError, RuntimeError) as error:
            self._error = error
