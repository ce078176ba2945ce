"""Jobs that train in turns: compared variants run at the same time and alternate in short segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.processes import Scratch, ckptless_run
from benchmarks.harness.scenario import Scenario, running
from benchmarks.harness.watch import START_S, Watch
from benchmarks.harness.wire import Note
from benchmarks.jobs.job import JobOptions

WARM_UP_STEPS = 4
"""First steps of a segment, which are not measured."""
PATIENCE_PER_STEP_S = 120.0
"""The largest model takes half a minute per step when four ranks share two cores."""

Segment = dict[str, Any]
"""Under `ranks`, what each rank reports of the measured steps; under `cpu_per_step_s`, the CPU time of a rank."""
Measure = Callable[[Watch, Path, int], Segment]
"""Lets a job, which runs in a folder, train a number of steps."""


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

    def count(self, step_s: float) -> int:
        """Return the number of measured steps of a segment."""
        return max(self.steps[0], min(self.steps[1], int(self.segment_s / step_s)))


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


def segment_of(watch: Watch, _: Path, steps: int, warm_up: int = WARM_UP_STEPS) -> Segment:
    """Let a job train; return what its ranks report of the steps after the warm-up."""
    reports = train(watch, warm_up + steps)
    own_cpu_s = sum(report.pop("cpu_s") for report in reports)
    ranks = [
        {name: value[warm_up:] if isinstance(value, list) else value for name, value in report.items()}
        for report in reports
    ]
    return {"ranks": ranks, "cpu_per_step_s": own_cpu_s / (warm_up + steps) / len(ranks)}


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
        count = plan.count(median(step for report in first for step in report["steps_s"][WARM_UP_STEPS:]))
        found: dict[str, list[Segment]] = {name: [] for name in jobs}
        for _ in range(plan.rounds):
            for name, (watch, folder) in jobs.items():
                found[name].append(segment(watch, folder, count))
                done()
        return found
