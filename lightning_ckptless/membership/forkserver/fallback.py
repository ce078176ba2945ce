"""Where an agent's workers come from, and what is done when they cannot come from there.

| The fork server | Then |
|---|---|
| ends while workers are forked | another one like it is started, and all workers with it |
| has ended so three times in a row | new interpreters are started from then on |
| says that a fork of it would not be a clean process | the same |
| is all that has what the workers run (a notebook's) | the run ends, in the place of new interpreters |
| has a successor, and that ends while workers are forked | they are forked from the first one |
| says that the system allows no further process | all workers are started again after a pause, three times |

Workers never outlive the parent that has forked them, so none is left when the next one begins.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from lightning_ckptless.membership.agent.workers import Workers
from lightning_ckptless.membership.forkserver.client import ForkError, ForkServer, ForkServerLostError, UnsafeForkError
from lightning_ckptless.membership.forkserver.succession import Succession

_MOST_LOSSES = 3
_MOST_REFUSALS = 3
_PAUSE_S = 0.5
"""Before the first further try; each one after it waits twice as long. Those that were killed have to be gone."""


class ForkFallback:
    """The parent of an agent's workers, and the one that stands in for it.

    Args:
        parent: preloaded; whoever gave it closes it.
        fresh: start new interpreters instead of forking it.
        record: receives events.
        say: tells the user something.

    Attributes:
        succession: of the parent, by one that has imported what the program imports.
        fresh: whether new interpreters are started.
    """

    def __init__(
        self, parent: ForkServer, *, fresh: bool, record: Callable[..., None], say: Callable[[str], None]
    ) -> None:
        self.succession = Succession(record, say)
        self._first = parent
        self.fresh = fresh
        self._say = say
        self._substitute: ForkServer | None = None

    @property
    def parent(self) -> ForkServer:
        """The one that forks now."""
        return self.succession.successor or self._first

    def maintain(self) -> None:
        """Look after the succession, while training is under way."""
        if not self.fresh:
            self.succession.maintain(self._first)

    def start(self, make: Callable[[], Workers]) -> Workers:
        """Start all workers, as often as it takes.

        Args:
            make: them anew, for the parent and in the way that the attributes say.

        Raises:
            LaunchError: not even new interpreters can be started.
        """
        losses = refusals = 0
        while True:
            workers = make()
            try:
                workers.start()
            except UnsafeForkError as error:
                workers.close(signal.SIGKILL)
                if not self.parent.executes:
                    raise
                self._start_afresh(str(error))
            except ForkError as error:
                workers.close(signal.SIGKILL)
                if refusals == _MOST_REFUSALS:
                    raise
                pause_s = _PAUSE_S * 2**refusals
                refusals += 1
                self._say(f"{error}; all workers are started again in {pause_s:g} s")
                time.sleep(pause_s)
            except ForkServerLostError as error:
                workers.close(signal.SIGKILL)
                losses += 1
                if losses > _MOST_LOSSES and (self.fresh or not self.parent.executes):
                    raise
                if losses == _MOST_LOSSES and self.parent.executes:
                    self._start_afresh(f"{error}, {losses} times in a row")
                else:
                    self._say(f"{error}; another one is started, and they with it")
            else:
                return workers

    def _start_afresh(self, why: str) -> None:
        self._say(f"workers are started afresh from now on, a relaunch takes longer: {why}")
        self.fresh = True
        self.succession.close()
        self._first = self._substitute = ForkServer(flags=self._first.flags)

    def close(self) -> None:
        """End those that were started here: a successor, and the parent that stands in."""
        self.succession.close()
        if self._substitute is not None:
            self._substitute.close()
