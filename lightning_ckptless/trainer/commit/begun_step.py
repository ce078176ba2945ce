"""The step that each rank has begun, stamped into the arena: after a fault it tells how many steps are replayed."""

from __future__ import annotations

from pathlib import Path

from lightning_ckptless.replica.transport import Transport


class BegunStep:
    """Stamps the steps of one rank.

    Args:
        arena: folder of the node's arena.
        rank: this rank.
    """

    def __init__(self, arena: Path, rank: int) -> None:
        self._path = arena / f"begun-by-{rank:04d}"
        self._last = -1

    def stamp(self, step: int) -> None:
        """Record that a step has begun; does nothing if it is already recorded."""
        if step != self._last:
            self._path.write_text(str(step))
            self._last = step


def step_in_flight(arena: Path, transport: Transport) -> int:
    """The last step that all ranks had begun when the last generation ended; 0 if nothing was stamped."""
    stamps = [path.read_text() for path in arena.glob("begun-by-*")]
    return min((int(s) for line in transport.gather(" ".join(stamps).encode()) for s in line.split()), default=0)
