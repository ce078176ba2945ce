"""The samples that the ranks of a counted job trained on, by step and by epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """A step that one rank has finished.

    Args:
        attempt: number of its start or reconfiguration; it increases over time.
        epoch: epoch of the step.
        step: optimizer step, from 0.
        rank: rank of the process.
        world: number of ranks.
        at: wall clock, seconds since the epoch.
        samples: indices of the samples that the rank trained on.
    """

    attempt: int
    epoch: int
    step: int
    rank: int
    world: int
    at: float
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A step that all ranks of its world have finished, and when the last of them did."""

    attempt: int
    number: int
    world: int
    at: float


def finished(rows: Iterable[Row]) -> list[Step]:
    """Return the steps that all ranks of their world have finished, by time; replayed steps occur twice."""
    ranks: dict[tuple[int, int, int], dict[int, float]] = {}
    for row in rows:
        ranks.setdefault((row.attempt, row.step, row.world), {})[row.rank] = row.at
    whole = [Step(*key, max(at.values())) for key, at in ranks.items() if len(at) == key[2]]
    return sorted(whole, key=lambda step: step.at)


def first_of(steps: Sequence[Step], world: int, *, after: float) -> Step | None:
    """Return the first step that `world` ranks finished after a moment."""
    return next((step for step in steps if step.world == world and step.at > after), None)


def counting(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that contribute to the final weights.

    An attempt that begins at a step rolls back what earlier attempts did from that step on.
    """
    rows, begins = list(rows), dict[int, int]()
    for row in rows:
        begins[row.attempt] = min(row.step, begins.get(row.attempt, row.step))
    return [
        row for row in rows if not any(later > row.attempt and begin <= row.step for later, begin in begins.items())
    ]


@dataclass(frozen=True, slots=True)
class Tally:
    """The samples of all epochs together, repeated uses within an epoch, and samples that an epoch did not use."""

    due: int
    twice: int
    never: int


def tally(rows: Iterable[Row], *, samples: int, epochs: int) -> Tally:
    """Count repeated and skipped samples of a job that has ended, without rolled-back steps."""
    seen = [Counter[int]() for _ in range(epochs)]
    for row in counting(rows):
        seen[row.epoch].update(row.samples)
    twice = sum(times - 1 for epoch in seen for times in epoch.values())
    return Tally(samples * epochs, twice, sum(samples - len(epoch) for epoch in seen))
