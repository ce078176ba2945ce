"""The step that each rank has begun, stamped into the arena: after a fault it says how many are run again."""

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
        """Note that a step is begun; costs nothing where it was noted before."""
        if step != self._last:
            self._path.write_text(str(step))
            self._last = step


def step_in_flight(arena: Path, transport: Transport) -> int:
    """The step that all ranks had begun when the last generation ended; 0 where nothing was stamped."""
    stamps = [path.read_text() for path in arena.glob("begun-by-*")]
    return min((int(s) for line in transport.gather(" ".join(stamps).encode()) for s in line.split()), default=0)
