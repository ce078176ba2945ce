"""Jobs that train in turns: compared variants run at the same time, alternate in short segments, and are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.processes import Scratch, ckptless_run
from benchmarks.harness.scenario import Scenario, running
from benchmarks.harness.table import Column
from benchmarks.harness.watch import START_S, Watch
from benchmarks.harness.wire import Note
from benchmarks.jobs.job import JobOptions

WARM_UP_STEPS = 4
"""First steps of a segment, which are not measured."""
PATIENCE_PER_STEP_S = 120.0
"""The largest model takes half a minute per step when four ranks share two cores."""

Segment = dict[str, Any]
"""Under `ranks`, what each rank reports of the measured steps; under `cpu_s`, its CPU time per step, by part."""
Measure = Callable[[Watch, Path, int], Segment]
"""Lets a job, which runs in a folder, train a number of steps."""
Quantity = Callable[[Segment], float]


@dataclass(frozen=True)
class Plan:
    """How long jobs train.

    Args:
        rounds: segments of each job.
        steps: minimum and maximum number of measured steps per segment.
        segment_s: target length of a segment in seconds, between these two.
    """

    rounds: int
    steps: tuple[int, int]
    segment_s: float = 0.0


def train(watch: Watch, steps: int) -> list[Segment]:
    """Let a job train this many steps, and return the reports of its ranks.

    Raises:
        NoRecoveryError: If the job has ended, or takes longer than so many steps may take.
    """
    waiting = _ready(watch, 0)
    for life in watch.now():
        life.turn = None
    for note in waiting:
        note.wire.send({"steps": steps})
    return [note.fields for note in _ready(watch, steps)]


def _ready(watch: Watch, steps: int) -> list[Note]:
    """Wait until all ranks wait for their turn, and return the notes with which they do."""
    timeout_s = START_S + steps * PATIENCE_PER_STEP_S
    lives = watch.until(lambda lives: all(life.turn for life in lives), timeout_s, f"the end of {steps} steps")
    return [life.turn for life in lives if life.turn is not None]


def segment_of(watch: Watch, _: Path, steps: int) -> Segment:
    """Let a job train; return what its ranks report of the steps after the warm-up."""
    reports = train(watch, WARM_UP_STEPS + steps)
    spent_s: Counter[str] = Counter()
    for report in reports:
        spent_s.update(report.pop("cpu_s"))
    ranks = [
        {name: value[WARM_UP_STEPS:] if isinstance(value, list) else value for name, value in report.items()}
        for report in reports
    ]
    executed = (WARM_UP_STEPS + steps) * len(ranks)
    return {"ranks": ranks, "cpu_s": {part: seconds / executed for part, seconds in spent_s.items()}}


def train_in_turns(
    variants: Mapping[str, JobOptions],
    place: Scratch,
    plan: Plan,
    done: Callable[[], None],
    segment: Measure = segment_of,
) -> dict[str, list[Segment]]:
    """Return the segments of all variants, one of each per round.

    Raises:
        NoRecoveryError: If a job ends before it is asked to.
    """
    launcher = ckptless_run("--max-restarts=0")
    with ExitStack() as stack:
        jobs = {
            name: stack.enter_context(running(Scenario(name, launcher, job.but(turns=True)), place, f"job-{number}"))
            for number, (name, job) in enumerate(variants.items())
        }
        first = [report for watch, _ in jobs.values() for report in train(watch, 2 * WARM_UP_STEPS)]
        step_s = median(step for report in first for step in report["steps_s"][WARM_UP_STEPS:])
        count = max(plan.steps[0], min(plan.steps[1], int(plan.segment_s / step_s)))
        found: dict[str, list[Segment]] = {name: [] for name in jobs}
        for _ in range(plan.rounds):
            for name, (watch, folder) in jobs.items():
                found[name].append(segment(watch, folder, count))
                done()
        return found


# ---------------------------------------------------------------------- what they took


def slowest_ms(segment: Segment) -> list[float]:
    """Return the steps of a segment in ms, each on the slowest rank."""
    return [1e3 * max(step) for step in zip(*(rank["steps_s"] for rank in segment["ranks"]), strict=True)]


def step_ms(segment: Segment) -> float:
    """Return the median step of a segment in ms, on the slower rank."""
    return float(1e3 * max(median(rank["steps_s"]) for rank in segment["ranks"]))


def cpu_ms(segment: Segment) -> float:
    """Return the CPU time of a step in ms: all threads of a rank, mean over steps and ranks."""
    return float(1e3 * sum(segment["cpu_s"].values()))


@dataclass(frozen=True)
class Variant:
    """The segments of one variant, and the neighbouring ones of the variant that it is compared with."""

    size: str
    batch: int
    name: str
    segments: list[Segment]
    base: list[Segment]
    step: Quantity = step_ms

    def over(self, quantity: Quantity | None = None, *, relative: bool = False) -> list[float]:
        """Return by how much a quantity exceeds that of the neighbouring segment, per round; nothing for the base."""
        of = quantity or self.step
        pairs = [(of(ours), of(base)) for ours, base in zip(self.segments, self.base, strict=True)]
        differences = [ours / base - 1 if relative else ours - base for ours, base in pairs]
        return [] if self.base is self.segments else differences

    def part_ms(self, name: str) -> list[float]:
        """Return one part of the steps in ms, of all ranks and segments; empty if it was never measured."""
        return [1e3 * v for segment in self.segments for rank in segment["ranks"] for v in rank.get(name, ())]

    def median_ms(self, name: str) -> float:
        return median(self.part_ms(name) or [0.0])

    def most(self, name: str) -> float:
        """Return the largest size that a rank reports."""
        return float(max(rank.get(name, 0) for rank in self.segments[-1]["ranks"]))


NAMES = (Column("model", lambda v: v.size), Column("batch", lambda v: v.batch), Column("strategy", lambda v: v.name))
