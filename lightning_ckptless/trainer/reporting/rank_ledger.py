"""The ledger of a run as one rank writes to it: each event carries the current generation and the rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_ckptless.console import PACKAGE_LOG, PREFIX
from lightning_ckptless.ledger import Ledger


class RankLedger:
    """Appends the events of one rank. May be used by several threads.

    Args:
        ledger: ledger of the run, shared by all its relaunches.
        rank: returns this rank, which a recovery may change.
        generation: returns the number of the current generation.
    """

    def __init__(self, ledger: Ledger, rank: Callable[[], int], generation: Callable[[], int]) -> None:
        self._ledger = ledger
        self._rank = rank
        self._generation = generation

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self._ledger.path

    @property
    def generation(self) -> int:
        """Number of the current generation."""
        return self._generation()

    def record(self, event: str, **fields: Any) -> None:
        """Append an event.

        Args:
            event: name of the event.
            fields: details.
        """
        self._ledger.record(event, generation=self._generation(), rank=self._rank(), **fields)


class WarningsInLedger(logging.Handler):
    """Records this package's warnings as events, wherever else the script's logging shows them.

    Args:
        ledger: ledger of this rank.
    """

    def __init__(self, ledger: RankLedger) -> None:
        super().__init__(logging.WARNING)
        self._ledger = ledger

    def emit(self, record: logging.LogRecord) -> None:
        """Record a warning."""
        self._ledger.record("warning", module=record.module, text=record.getMessage().removeprefix(PREFIX))

    def attach(self) -> None:
        """Record warnings from now on."""
        PACKAGE_LOG.addHandler(self)

    def detach(self) -> None:
        """Record no more warnings."""
        PACKAGE_LOG.removeHandler(self)
