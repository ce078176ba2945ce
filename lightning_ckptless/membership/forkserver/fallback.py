"""Which process forks an agent's workers, and what happens when it cannot.

| The fork server | Then |
|---|---|
| exits while workers are forked | a new fork server is started, and all workers with it |
| has exited so three times in a row | new interpreters are started from then on |
| reports that a fork of it would not be a clean process | the same |
| is the only process that has what the workers run (in a notebook) | the run ends: new interpreters could not run it |
| has a successor that exits while workers are forked | they are forked from the first one |
| reports that the system allows no further process | all workers are restarted after a pause, three times |

Workers never outlive the fork server that forked them, so none is left when the next one starts.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from lightning_ckptless.membership.agent.worker_context import WorkerContext
from lightning_ckptless.membership.events import ForkServerGivenUp, ForkServerReplaced, ForksRefused, Report
from lightning_ckptless.membership.forkserver.client import ForkError, ForkServer, ForkServerLostError, UnsafeForkError
from lightning_ckptless.membership.forkserver.succession import Succession

_MOST_LOSSES = 3
_MOST_REFUSALS = 3
_PAUSE_S = 0.5
"""Pause before the first retry, doubled for each later one. Killed processes have to disappear first."""


class ForkFallback:
    """The fork server of an agent's workers, and its substitutes.

    Args:
        parent: preloaded; its owner closes it.
        fresh: start new interpreters instead of forking it.
        report: receives events.

    Attributes:
        succession: succession of the fork server, by one that has imported what the script imports.
        fresh: whether new interpreters are started.
    """

    def __init__(self, parent: ForkServer, report: Report, *, fresh: bool) -> None:
        self.succession = Succession(report)
        self._first = parent
        self.fresh = fresh
        self._report = report
        self._substitute: ForkServer | None = None

    @property
    def parent(self) -> ForkServer:
        """The fork server that forks now."""
        return self.succession.successor or self._first

    def maintain(self) -> None:
        """Advance the succession during training."""
        if not self.fresh:
            self.succession.maintain(self._first)

    def start(self, make: Callable[[], WorkerContext]) -> WorkerContext:
        """Start all workers, retrying as described above.

        Args:
            make: creates them, for the current `parent` and `fresh`.

        Raises:
            LaunchError: not even new interpreters can be started.
        """
        losses = refusals = 0
        while True:
            context = make()
            try:
                context.start()
            except UnsafeForkError as error:
                context.close(signal.SIGKILL)
                if not self.parent.executes:
                    raise
                self._start_afresh(str(error))
            except ForkError as error:
                context.close(signal.SIGKILL)
                if refusals == _MOST_REFUSALS:
                    raise
                pause_s = _PAUSE_S * 2**refusals
                refusals += 1
                self._report(ForksRefused(error, pause_s))
                time.sleep(pause_s)
            except ForkServerLostError as error:
                context.close(signal.SIGKILL)
                losses += 1
                if losses > _MOST_LOSSES and (self.fresh or not self.parent.executes):
                    raise
                if losses == _MOST_LOSSES and self.parent.executes:
                    self._start_afresh(f"{error}, {losses} times in a row")
                else:
                    self._report(ForkServerReplaced(error))
            else:
                return context

    def _start_afresh(self, why: str) -> None:
        self._report(ForkServerGivenUp(why))
        self.fresh = True
        self.succession.close()
        self._first = self._substitute = ForkServer(flags=self._first.flags)

    def close(self) -> None:
        """End the fork servers that were started here: a successor, and a substitute."""
        self.succession.close()
        if self._substitute is not None:
            self._substitute.close()
