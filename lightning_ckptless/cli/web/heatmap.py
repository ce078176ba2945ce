"""Which rank was slow at which step: a table of ranks by steps, filled by looking at the run again and again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_ckptless.cli.survey.members import Member

MOST_COLUMNS = 120
MOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class Cell:
    """One rank at one step.

    Args:
        step_s: its own time per step in seconds, smoothed over about ten steps; None if unknown.
        state: state of its process.
    """

    step_s: float | None
    state: str


@dataclass(frozen=True, slots=True)
class Row:
    """One rank at all steps of a heatmap.

    Args:
        rank: the rank.
        cells: one per step; None if it was no member of the run.
    """

    rank: int
    cells: tuple[Cell | None, ...]


class Heatmap:
    """The last steps at which a run was looked at.

    Args:
        most_columns: number of steps to keep.
    """

    def __init__(self, most_columns: int = MOST_COLUMNS) -> None:
        self._columns: deque[tuple[int, dict[int, Cell]]] = deque(maxlen=most_columns)

    def add(self, members: Sequence[Member]) -> None:
        """Add a look. If no rank has begun another step since the last one, it replaces the last one."""
        step = max((member.step or 0 for member in members), default=0)
        column = {member.rank: Cell(member.step_s, member.state) for member in members}
        if self._columns and self._columns[-1][0] == step:
            self._columns.pop()
        if step:
            self._columns.append((step, column))

    @property
    def steps(self) -> tuple[int, ...]:
        """The step of each column."""
        return tuple(step for step, _ in self._columns)

    def rows(self, most: int = MOST_ROWS) -> tuple[Row, ...]:
        """Return one row per rank; of many ranks, those that were slowest at the last step.

        Args:
            most: number of rows.
        """
        if not self._columns:
            return ()
        last = self._columns[-1][1]
        slowest = sorted(last, key=lambda rank: (last[rank].state == "running", -(last[rank].step_s or 0.0)))
        return tuple(
            Row(rank, tuple(column.get(rank) for _, column in self._columns)) for rank in sorted(slowest[:most])
        )
