"""The succession of the fork server by a process that has imported what the script imports.

| State | Is left when | For |
|---|---|---|
| `waiting` | a worker has reported what its script has imported, and training is under way | `importing` |
| `importing` | the successor has imported everything, and can be forked | `ready` |
| `importing` | modules must be left out | `importing`, with another successor that leaves them out |
| `importing` | that happened too often, or it exited or takes too long | `given up` |
| `ready` | the successor exits | `waiting`, twice, then `given up` |

The successor is a fork of the first fork server, so that one's imports take no further time or memory. Until it is
ready, and whenever it is lost, workers are forked from the first one.
"""

from __future__ import annotations

import time
from dataclasses import replace

from lightning_ckptless.errors import LaunchError
from lightning_ckptless.membership.events import ImportsLearned, ImportsNotLearned, Report
from lightning_ckptless.membership.forkserver.client import ForkServer, Successor
from lightning_ckptless.membership.forkserver.import_learning import ImportRequest
from lightning_ckptless.protocol.replacement_startup import Imports

_MOST_TRIES = 6
_MOST_LOSSES = 2
_LONGEST_S = 600.0
"""Longest duration of an attempt, at a quarter of a core."""
_NAMED = 5


class Succession:
    """The succession of one agent's fork server.

    Args:
        report: receives events.

    Attributes:
        state: its state, as in the table above.
    """

    def __init__(self, report: Report) -> None:
        self.state = Imports.WAITING
        self._report = report
        self._request: ImportRequest | None = None
        self._successor: Successor | None = None
        self._tries = 0
        self._losses = 0
        self._began_at = 0.0

    @property
    def successor(self) -> ForkServer | None:
        """The process from which workers are forked; None for the first fork server."""
        is_there = self.state is Imports.READY and self._successor is not None and self._successor.is_alive
        return self._successor if is_there else None

    def learn(self, request: ImportRequest) -> None:
        """Record what the script has imported; only the first report counts."""
        if self._request is None:
            self._request = request

    def maintain(self, first: ForkServer) -> None:
        """Start or advance the succession; called while training is under way.

        Args:
            first: the fork server to succeed.
        """
        if self.state is Imports.WAITING and self._request is not None and self._request.imported.modules:
            self._begin(first, self._request)
        elif self.state is Imports.IMPORTING:
            self._poll(first)
        elif self.state is Imports.READY and self.successor is None:
            self._lose()

    def close(self) -> None:
        """End the successor, and the workers that it has forked."""
        if self._successor is not None:
            self._successor.close()
            self._successor = None

    def _begin(self, first: ForkServer, request: ImportRequest) -> None:
        self._tries += 1
        self._began_at = time.monotonic()
        self.state = Imports.IMPORTING
        self._successor = Successor(first)
        try:
            self._successor.learn(request.to_message())
        except LaunchError as error:
            self._give_up(str(error))

    def _poll(self, first: ForkServer) -> None:
        assert self._successor is not None
        assert self._request is not None
        try:
            answer = self._successor.learned()
        except LaunchError as error:
            self._give_up(str(error))
            return
        if answer is None:
            if time.monotonic() - self._began_at > _LONGEST_S:
                self._give_up(f"the imports did not complete within {_LONGEST_S:.0f} s")
        elif unsafe := answer["unsafe"]:
            self._successor.close()
            self._request = replace(self._request, left_out={**self._request.left_out, **unsafe})
            if self._tries < _MOST_TRIES:
                self._begin(first, self._request)
            else:
                self._give_up(f"after {self._tries} attempts there are still unsafe modules: {_named(unsafe)}")
        elif answer["unfit"]:
            self._give_up(answer["unfit"])
        else:
            self._take_over(answer["learned"], answer["took_s"], self._request.left_out)

    def _take_over(self, modules: int, took_s: float, left_out: dict[str, str]) -> None:
        assert self._successor is not None
        self.state = Imports.READY
        self._report(ImportsLearned(modules, left_out, self._tries, round(took_s, 3), self._successor.pid))

    def _lose(self) -> None:
        self._losses += 1
        self.close()
        self.state = Imports.WAITING
        if self._losses > _MOST_LOSSES:
            self._give_up(f"the process that had imported them exited {self._losses} times")

    def _give_up(self, reason: str) -> None:
        self.close()
        self.state = Imports.GIVEN_UP
        self._report(ImportsNotLearned(reason, self._tries))


def _named(modules: dict[str, str]) -> str:
    names = [f"{name} {reason}" for name, reason in list(modules.items())[:_NAMED]]
    more = len(modules) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
