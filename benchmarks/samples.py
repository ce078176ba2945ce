"""What the ranks of an elastic job have trained on, and when: read line by line, and counted without a clock."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """A step that one rank has finished.

    Args:
        attempt: number of the start or regrouping that it belongs to; later ones are larger.
        epoch: of the step.
        step: optimizer step, from 0.
        rank: of the process.
        world: number of ranks.
        at: wall clock, seconds since the epoch.
        samples: that the rank has trained on.
    """

    attempt: int
    epoch: int
    step: int
    rank: int
    world: int
    at: float
    samples: tuple[int, ...]


@dataclass
class Rows:
    """Rows that come in while the job runs.

    Args:
        folder: where the ranks write, a file each.
        rows: those that were read so far.
    """

    folder: Path
    rows: list[Row] = field(default_factory=list)
    _read: dict[Path, int] = field(default_factory=dict)

    def look(self) -> list[Row]:
        """All rows, those that are new included."""
        for path in self.folder.glob("seen-*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            # A line that is not whole yet is read the next time.
            whole = new[: new.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                said = json.loads(line)
                self.rows.append(Row(**said | {"samples": tuple(said["samples"])}))
        return self.rows


@dataclass(frozen=True, slots=True)
class Step:
    """A step that all ranks of its world have finished.

    Args:
        attempt: that it belongs to.
        number: optimizer step, from 0.
        world: number of ranks.
        at: when the last of them was done.
    """

    attempt: int
    number: int
    world: int
    at: float


def finished(rows: Iterable[Row]) -> list[Step]:
    """The steps that all ranks of their world have finished, in the order of time; some come again."""
    ranks: dict[tuple[int, int, int], dict[int, float]] = {}
    for row in rows:
        ranks.setdefault((row.attempt, row.step, row.world), {})[row.rank] = row.at
    whole = [Step(*key, max(at.values())) for key, at in ranks.items() if len(at) == key[2]]
    return sorted(whole, key=lambda step: step.at)


def first_of(steps: Sequence[Step], world: int, *, after: float) -> Step | None:
    """The first step that so many ranks have finished after a moment."""
    return next((step for step in steps if step.world == world and step.at > after), None)


def last_before(steps: Sequence[Step], at: float) -> Step:
    """The last step that was finished before a moment."""
    return [step for step in steps if step.at < at][-1]


def counting(rows: Iterable[Row]) -> list[Row]:
    """The rows that have made the weights what they are at the end.

    An attempt that begins at a step takes back what earlier ones have done from there on.
    """
    rows = list(rows)
    begins: dict[int, int] = {}
    for row in rows:
        begins[row.attempt] = min(row.step, begins.get(row.attempt, row.step))
    return [
        row for row in rows if not any(later > row.attempt and begin <= row.step for later, begin in begins.items())
    ]


@dataclass(frozen=True, slots=True)
class Tally:
    """How often the samples came.

    Args:
        due: samples of all epochs together.
        twice: times that one came in an epoch that had already had it.
        never: samples of an epoch that it has not had.
    """

    due: int
    twice: int
    never: int


def tally(rows: Iterable[Row], *, samples: int, epochs: int) -> Tally:
    """Count what counts.

    Args:
        rows: of the job that has ended.
        samples: of the data set.
        epochs: of the job.
    """
    seen = [Counter[int]() for _ in range(epochs)]
    for row in counting(rows):
        seen[row.epoch].update(row.samples)
    twice = sum(times - 1 for epoch in seen for times in epoch.values())
    return Tally(samples * epochs, twice, sum(samples - len(epoch) for epoch in seen))
