"""The step times of jobs that train in turns: what a variant costs more than the one that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

from benchmarks.harness.table import Column
from benchmarks.harness.turns import Segment

Quantity = Callable[[Segment], float]


def slowest_ms(segment: Segment) -> list[float]:
    """Return the steps of a segment in ms, each on the slowest rank."""
    return [1e3 * max(step) for step in zip(*(rank["steps_s"] for rank in segment["ranks"]), strict=True)]


def step_ms(segment: Segment) -> float:
    """Return the median step of a segment in ms, on the slower rank."""
    return float(1e3 * max(median(rank["steps_s"]) for rank in segment["ranks"]))


def mean_ms(segment: Segment) -> float:
    """Return the mean step of a segment in ms, until all work on the device is done."""
    return float(1e3 * segment["ranks"][0]["mean_s"])


def cpu_ms(segment: Segment) -> float:
    """Return the CPU time of a step in ms: all threads of a rank, mean over steps and ranks."""
    return float(1e3 * segment["cpu_per_step_s"])


@dataclass(frozen=True)
class Variant:
    """The segments of one variant, and the neighbouring ones of the variant that it is compared with."""

    size: str
    batch: int
    name: str
    segments: list[Segment]
    base: list[Segment]
    step: Quantity = step_ms

    @property
    def is_base(self) -> bool:
        return self.base is self.segments

    def over_ms(self, quantity: Quantity | None = None) -> list[float]:
        """Return the difference of a quantity from the neighbouring segment, per round; nothing for the base."""
        quantity = quantity or self.step
        pairs = zip(self.segments, self.base, strict=True)
        return [] if self.is_base else [quantity(ours) - quantity(theirs) for ours, theirs in pairs]

    def over_mean(self) -> list[float]:
        """Return the quotient of the mean steps and those of the neighbouring segment, minus one, per round."""
        pairs = zip(self.segments, self.base, strict=True)
        return [] if self.is_base else [fmean(slowest_ms(a)) / fmean(slowest_ms(b)) - 1 for a, b in pairs]

    def steps_ms(self) -> list[float]:
        """Return all steps in ms, each on the slowest rank."""
        return [step for segment in self.segments for step in slowest_ms(segment)]

    def part_ms(self, name: str) -> list[float]:
        """Return one part of the steps in ms, of all ranks and segments; empty if it was never measured."""
        return [1e3 * v for segment in self.segments for rank in segment["ranks"] for v in rank.get(name, ())]

    def median_ms(self, name: str) -> float:
        return median(self.part_ms(name) or [0.0])

    @property
    def shard_mb(self) -> float:
        """Megabytes that a rank stages per step."""
        return float(max(rank.get("staged_bytes", 0) for rank in self.segments[-1]["ranks"]) / 1e6)


def part(head: str, name: str, form: str = ".2f") -> Column:
    """Return the column of the median of a part of the steps, in ms."""
    return Column(head, lambda variant: variant.part_ms(name), form, median)
