"""The step that each rank has begun, stamped into the arena: after a fault it tells how many steps are replayed."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_ckptless.replica.transport import Transport

_DIGITS = 20
"""Width of a stamp, so that each overwrites the one before without a moment at which the file is empty."""


class StepStamps:
    """Stamps the steps of one rank.

    Args:
        arena: folder of the node's arena.
    """

    def __init__(self, arena: Path) -> None:
        self._arena = arena
        self._last = (-1, -1)
        self._file: int | None = None

    def stamp(self, rank: int, step: int) -> None:
        """Record that a step has begun; does nothing if it is already recorded.

        Args:
            rank: this rank, which a recovery may change.
            step: the step.
        """
        if (rank, step) == self._last:
            return
        if self._file is None or rank != self._last[0]:
            self.close()
            self._file = os.open(_path(self._arena, rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.pwrite(self._file, f"{step:{_DIGITS}}".encode(), 0)
        self._last = (rank, step)

    def close(self) -> None:
        """Close the file, which stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def step_in_flight(arena: Path, transport: Transport) -> int:
    """The last step that all ranks had begun when the last generation ended; 0 if nothing was stamped."""
    stamps = [path.read_text() for path in arena.glob("begun-by-*")]
    return min((int(s) for line in transport.gather(" ".join(stamps).encode()) for s in line.split()), default=0)


def last_begun(arena: Path) -> int:
    """The last step that any rank of this node has begun; 0 if nothing was stamped."""
    return max((int(path.read_text() or 0) for path in arena.glob("begun-by-*")), default=0)


def _path(arena: Path, rank: int) -> Path:
    return arena / f"begun-by-{rank:04d}"
