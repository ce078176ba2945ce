"""The forecast against reality: jobs whose ranks are killed as a failure model says, and what was predicted for them.

First, calibration runs are killed at regular intervals; their ledgers say what a step, a version and a recovery cost,
as `ckptless forecast --from` reads them. Then jobs of half a minute are killed at random: gaps are exponential or
Weibull with shape 0.6, or every failure takes two ranks within a second; the mean time between failures is 2 to 60 s.
Two forecasts are compared with the goodput that each job has measured: one is given the model, and simulates jobs of
the same length; the other one is given the instants at which ranks were killed. The first shows what to expect, and the
second whether the model of the job is right, without the luck of the draw. At last, the same failures hit jobs with
other mirror intervals, and the best of them is compared with the recommended one. Takes 25 minutes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from statistics import mean, median, stdev
from typing import Any

import numpy as np

from benchmarks.harness.benchmark import Benchmark, Results, Steps, option
from benchmarks.harness.processes import Scratch, ckptless_run, scratch
from benchmarks.harness.scenario import OURS, Scenario, running
from benchmarks.harness.table import Column, Table
from benchmarks.harness.watch import START_S, Watch
from lightning_ckptless.cli.forecast_measured import measured_in
from lightning_ckptless.cli.runs import Run, find_run
from lightning_ckptless.cli.time_spent import run_time
from lightning_ckptless.ledger import Event
from lightning_ckptless.protocol.forecast.failure_model import SECONDS_PER_DAY, Gaps, Incident
from lightning_ckptless.protocol.forecast.inputs import forecastable, inputs_from
from lightning_ckptless.protocol.forecast.job import Job
from lightning_ckptless.protocol.forecast.simulation import simulate
from lightning_ckptless.protocol.time_account import Bucket

RANKS, PACE_S, END_S = 3, 0.1, 600.0
NO_LIMITS = {"max_recoveries_without_progress": 10**6, "max_recoveries_per_hour": 10**6}
DRAWS = 300
"""Number of simulated jobs from which the expected goodput of a model is computed."""
POSITIONS = 50
"""Number of simulated jobs over which the forecast for known failures is averaged."""
WITHIN_S = 1.0
"""Time between the two losses of a burst, at most."""
MODELS = ("exponential", "Weibull, k = 0.6", "bursts of two")
MTBF_S = (2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 35.0, 60.0)
INTERVALS = (1, 2, 5, 10)
GRID_MTBF_S = 5.0
TARGET, GRID_TARGET = 0.02, 0.005
Found = dict[str, Any]
Kills = list[tuple[float, int]]
"""Pairs (seconds since the first batch, rank)."""


@dataclass(frozen=True)
class Trial:
    """A job that is run.

    Args:
        name: name of its folder.
        model: failure model.
        mtbf_s: mean time between failures, in seconds.
        every: steps between versions.
        seed: seed of its failures.
        in_place: whether it may recover in place.
    """

    name: str
    model: str
    mtbf_s: float
    every: int = 1
    seed: int = 0
    in_place: bool = True

    def kills(self, horizon_s: float) -> Kills:
        """Draw its failures."""
        chance = np.random.default_rng(self.seed)
        if self.model == "regular":
            return [(at, int(chance.integers(RANKS))) for at in np.arange(self.mtbf_s, horizon_s, self.mtbf_s)]
        found: Kills = []
        for at in Gaps(self.mtbf_s, 0.6 if self.model == MODELS[1] else 1.0).draw(chance, horizon_s):
            first, second = chance.permutation(RANKS)[:2]
            found.append((at, int(first)))
            if self.model == MODELS[2]:
                found.append((at + WITHIN_S * float(chance.random()), int(second)))
        return sorted(found)


def trials(count: int) -> list[Trial]:
    """Return the jobs of the comparison: all models at all rates, again with other seeds while more are wanted."""
    pairs = [(model, mtbf_s) for mtbf_s in MTBF_S for model in MODELS]
    return [Trial(f"trial-{number}", *pairs[number % len(pairs)], seed=100 + number) for number in range(count)]


CALIBRATION = {
    Trial("calibration", "regular", 4.0, seed=1): ("step_s", "data_wait_s", "version_s", "in_place_s"),
    Trial("calibration-relaunch", "regular", 8.0, seed=2, in_place=False): ("relaunch_s",),
}
"""The calibration runs, and what each measures."""
GRID = [Trial(f"grid-{every}-{seed}", MODELS[0], GRID_MTBF_S, every, seed) for seed in (7, 8) for every in INTERVALS]


def train(trial: Trial, steps: int, place: Scratch) -> tuple[Run, Kills]:
    """Run a job, kill its ranks, and return its ledger and the failures that hit it."""
    command = ckptless_run("--max-restarts=1000000", *([] if trial.in_place else ["--no-in-place"]))
    job = OURS.but(devices=RANKS, pace_s=PACE_S, strategy_options={"mirror_every_n_steps": trial.every, **NO_LIMITS})
    with running(Scenario(trial.name, command, job), place, trial.name, steps=steps) as (watch, folder):
        hits = kill(watch, trial.kills(END_S))
        watch.until_end(END_S)
    return find_run(None, folder / "runs"), hits


def kill(watch: Watch, kills: Kills) -> Kills:
    """Kill the newest process of each rank at its instant until the job is over, and return the kills that hit one."""
    lives = watch.until(lambda lives: all("train" in life.moments for life in lives), START_S, "the first batch")
    began_at, hits = max(life.moments["train"] for life in lives), Kills()
    for after_s, rank in kills:
        watch.follow(began_at + after_s - time.time())
        if not watch.command.running or any("done" in life.moments for life in watch.now()):
            break
        if "disconnected" not in watch.lives[watch.pids[rank]].moments:
            with suppress(ProcessLookupError):
                os.kill(watch.pids[rank], signal.SIGKILL)
                hits.append((time.time() - began_at, rank))
    return hits


# ---------------------------------------------------------------------- forecasts


def measured_goodput(events: Sequence[Event]) -> tuple[float, float]:
    """Return the goodput from the first batch to the last, and the seconds in between."""
    seconds = run_time(events).account.seconds
    span_s = sum(spent_s for bucket, spent_s in seconds.items() if bucket not in (Bucket.START, Bucket.IDLE))
    return seconds[Bucket.TRAINING] / span_s, span_s


def job_of(costs: Found, every: int | str, mtbf_s: float) -> Job:
    """Return the job that the forecast makes of calibrated costs; each failure takes a process of its only node."""
    rate = 1000 * SECONDS_PER_DAY / mtbf_s
    given = {"nodes": 1, "ranks_per_node": RANKS, "rate": rate, "process_share": 1.0, "durable_every_s": 0.0}
    few = {"days": 1e-3, "trials": 1, "mirror_every_n_steps": every, "mirror_budget": 1.0}
    return forecastable(inputs_from({**given, **few, **costs}), None).job


def simulated(job: Job, instants: Sequence[float], span_s: float) -> float:
    return simulate(job, [Incident(at_s, (), ()) for at_s in instants], span_s).ettr


def forecast_of(job: Job, kills: Kills, span_s: float) -> float:
    """Return the forecast goodput of a job that is hit by these failures, averaged over their positions in a segment.

    How much a failure undoes depends on its position between two versions. A job drifts by a few per cent of a step
    per step, so after some seconds the position does not follow from the instant.
    """
    known = [at_s for at_s, _ in kills if at_s < span_s]
    shifts = np.random.default_rng(0).uniform(-0.5, 0.5, (POSITIONS, len(known))) * job.segment.total_s
    instants = np.sort(np.maximum(0.0, known + shifts))
    return mean(simulated(job, drawn, span_s) for drawn in instants.tolist())


def compare(trial: Trial, run: Run, kills: Kills, costs: Found) -> Found:
    """Return what a job has measured, both forecasts, and the standard deviation of what the model expects."""
    goodput, span_s = measured_goodput(run.events)
    job = job_of(costs, trial.every, trial.mtbf_s)
    draws = [replace(trial, seed=10_000 + number).kills(span_s) for number in range(DRAWS)]
    expected = [simulated(job, [at_s for at_s, _ in drawn], span_s) for drawn in draws]
    return {
        **asdict(trial), "kills": kills, "span_s": span_s, "goodput": goodput,
        "forecast": forecast_of(job, kills, span_s), "expected": mean(expected), "spread": stdev(expected),
    }  # fmt: skip


# ---------------------------------------------------------------------- results


def off(row: Found) -> float:
    """Measured goodput minus the forecast for the same failures."""
    return float(row["goodput"] - row["forecast"])


JOBS = (
    Column("failures", "model"),
    Column("mean time between s", "mtbf_s", "g"),
    Column("killed", lambda row: len(row["kills"])),
    Column("s", "span_s", ".0f"),
    Column("measured", "goodput", ".1%"),
    Column("forecast for these failures", "forecast", ".1%"),
    Column("difference", off, "+.2%"),
    Column("expected of the model", lambda row: f"{row['expected']:.1%} ± {row['spread']:.1%}"),
)
MEANS = (
    Column("mirror_every_n_steps", "every"),
    Column("jobs", "jobs"),
    Column("measured", "goodput", ".1%"),
    Column("forecast", "forecast", ".1%"),
    Column("difference", off, "+.2%"),
)


def jobs_table(rows: Sequence[Found], costs: Found) -> Table:
    apart, worst = [abs(off(row)) for row in rows], max(rows, key=lambda row: abs(off(row)))
    outside = sum(abs(row["goodput"] - row["expected"]) > 2 * row["spread"] for row in rows)
    word = "met" if median(apart) <= TARGET else "missed"
    notes = [
        f"Measured minus forecast, absolute: median {median(apart):.2%} (target {TARGET:.0%}): {word}",
        f"Worst: {max(apart):.2%} ({worst['model']}, {worst['mtbf_s']:g} s)",
        f"Beyond two standard deviations of the expected goodput: {outside} of {len(rows)}",
        "Calibrated: " + ", ".join(f"{name} = {1e3 * value:.1f} ms" for name, value in costs.items()),
    ]
    title = "Goodput from the first batch to the last: measured, and forecast from the calibration runs"
    return Table.of(title, rows, *JOBS, notes=notes)


def intervals_table(rows: Sequence[Found], recommended: int) -> Table:
    """Return the table of the means of all jobs with the same mirror interval."""
    grid: list[Found] = []
    for every in sorted({row["every"] for row in rows}):
        same = [row for row in rows if row["every"] == every]
        means = {name: mean(row[name] for row in same) for name in ("goodput", "forecast")}
        grid.append({"every": every, "jobs": len(same), **means})
    best, note = max(grid, key=lambda row: row["goodput"]), f"Recommended: {recommended}"
    for row in (row for row in grid if row["every"] == recommended):
        below = best["goodput"] - row["goodput"]
        word = "met" if below <= GRID_TARGET else "missed"
        note += f", {below:.2%} below the best, {best['every']} (target {GRID_TARGET:.1%}): {word}"
    title = f"Goodput by mirror interval, with the same failures every {GRID_MTBF_S:g} s on average"
    return Table.of(title, grid, *MEANS, notes=[note])


@dataclass
class Goodput(Benchmark):
    jobs: int = option(24, "jobs that are compared", quick=2)
    steps: int = option(250, "steps of a job, 0.1 s each", quick=80)

    def measure(self, results: Results, steps: Steps) -> None:
        grid = GRID[:: len(GRID) - 1] if self.quick else GRID
        wanted = [*trials(self.jobs), *grid]
        steps.expect(len(CALIBRATION) + len(wanted))
        costs = results["costs"] = Found()
        results |= {"trials": [], "grid": []}
        with scratch() as place:
            for trial, names in CALIBRATION.items():
                steps.begin(trial.name)
                found = measured_in(train(trial, self.steps, place)[0])
                costs |= {name: found[name][0] for name in names}
                steps.done()
            for trial in wanted:
                steps.begin(f"{trial.name}: {trial.model}, {trial.mtbf_s:g} s between failures")
                run, kills = train(trial, self.steps, place)
                results["grid" if trial in grid else "trials"].append(compare(trial, run, kills, costs))
                steps.done()
        results["recommended"] = job_of(costs, "auto", GRID_MTBF_S).choices.mirror_every_n_steps

    def tables(self, results: Results) -> list[Table]:
        return [
            jobs_table(results["trials"], results["costs"]),
            intervals_table(results["grid"], results["recommended"]),
        ]


if __name__ == "__main__":
    Goodput.main()
