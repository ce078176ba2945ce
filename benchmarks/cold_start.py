"""Command to the first optimizer step that all ranks have finished, compared with Lightning's `ddp`.

All command lines start the same script, alternate, and end after the first step. The script reports when it begins,
when torch and Lightning are imported, when it calls `fit`, and when the step is done. Takes ten minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.harness.benchmark import Benchmark, Results, Steps, option
from benchmarks.harness.processes import Scratch, ckptless_run, python, scratch, torchrun
from benchmarks.harness.scenario import Scenario, running
from benchmarks.harness.table import Column, Group, Table, count_of, each, verdict
from benchmarks.harness.watch import START_S
from benchmarks.jobs.job import JobOptions

BASE = "python, ddp"
DDP = JobOptions(strategy="ddp")
SCENARIOS = (
    Scenario(BASE, python, DDP),
    Scenario("ckptless run", ckptless_run()),
    Scenario("ckptless run --no-preload", ckptless_run("--no-preload")),
    Scenario("python, ckptless", python),
    Scenario("torchrun, ddp", torchrun, DDP),
    Scenario("torchrun, ckptless", torchrun),
)
TARGETS = {"ckptless run": 1.0, "python, ckptless": 1.3}
"""Longest time allowed, as a multiple of `BASE`."""


def start_once(scenario: Scenario, size: str, place: Scratch, name: str) -> dict[str, Any]:
    """Start the script, wait for its first step and its end.

    Returns:
        Seconds to the first step, and the milestones of each rank in seconds since the command.
    """
    with running(scenario, place, name, size=size, steps=1) as (watch, _):
        lives = watch.until(lambda found: all(life.first_step for life in found), START_S, "the first step")
        watch.until_end()
        since = watch.command.began_at
    return {
        "seconds": max(life.moments["step"] for life in lives) - since,
        "first_script": min(life.moments["script"] for life in watch.lives.values() if life.moments) - since,
        "ranks": [{moment: at - since for moment, at in life.moments.items()} for life in lives],
    }


def quotients(group: Group) -> list[float]:
    """Return the times as multiples of those of `BASE` in the same rounds."""
    return [ours["seconds"] / base["seconds"] for ours, base in zip(group.items, group.context, strict=True)]


def milestone(moment: str) -> Callable[[Group], list[float]]:
    return lambda group: [max(rank[moment] for rank in start["ranks"]) for start in group.items]


STARTS = (
    Column("launcher, strategy", 0),
    Column("starts", count_of),
    Column("p50 s", each("seconds"), ".2f", median),
    Column("min s", each("seconds"), ".2f", min),
    Column("max s", each("seconds"), ".2f", max),
    Column(f"relative to {BASE}", quotients, ".2f", median),
)
MOMENTS = (
    Column("launcher, strategy", 0),
    Column("first line of the script", each("first_script"), ".2f", median),
    Column("of the last rank", milestone("script"), ".2f", median),
    Column("imported", milestone("imported"), ".2f", median),
    Column("fit called", milestone("fit"), ".2f", median),
    Column("training", milestone("train"), ".2f", median),
    Column("first step done", milestone("step"), ".2f", median),
)
MOMENTS_NOTE = (
    "With `python` the first process runs the script up to `fit`. There, with ddp, it is rank 0 and starts the other "
    "rank; with ckptless it becomes the agent."
)


@dataclass
class ColdStart(Benchmark):
    repeats: int = option(10, "starts of each command line, after one that is not counted", quick=1)
    size: str = option("1M", "model that is trained")

    def measure(self, results: Results, steps: Steps) -> None:
        results |= {scenario.name: [] for scenario in SCENARIOS}
        steps.expect(len(SCENARIOS) * (self.repeats + 1))
        with scratch() as place:
            for repeat in range(self.repeats + 1):
                for index, scenario in enumerate(SCENARIOS):
                    steps.begin(scenario.name if repeat else f"warm-up, {scenario.name}")
                    found = start_once(scenario, self.size, place, f"{index}-{repeat}")
                    results[scenario.name] += [found] if repeat else []
                    steps.done()

    def tables(self, results: Results) -> list[Table]:
        groups = [Group(launcher, starts, results[BASE]) for launcher, starts in results.items()]
        notes = ["Relative: median over rounds of the quotient within the round."]
        notes += [
            f"{group.name}: {verdict(median(quotients(group)), TARGETS[group.name], f'x {BASE}')}"
            for group in groups
            if group.name in TARGETS
        ]
        starts = "Command to the first optimizer step finished by two ranks"
        moments = "Milestones, slowest rank, medians in s since the command"
        return [
            Table.of(starts, groups, *STARTS, notes=notes),
            Table.of(moments, groups, *MOMENTS, notes=[MOMENTS_NOTE]),
        ]


if __name__ == "__main__":
    ColdStart.main()
