"""The forecast against reality: jobs whose ranks are killed as a failure model says, and what was predicted for them.

First, calibration runs are killed at regular intervals; their ledgers say what a step, a version and a recovery cost,
as `ckptless forecast --from` reads them. Then jobs of half a minute are killed at random: gaps are exponential or
Weibull with shape 0.6, or every failure takes two ranks within a second; the mean time between failures is 2 to 60 s.
Two forecasts are compared with the goodput that each job has measured: one is given the model, and simulates jobs of
the same length; the other one is given the instants at which ranks were killed. The first shows what to expect, and the
second whether the model of the job is right, without the luck of the draw. At last, the same failures hit jobs with
other mirror intervals, and the best of them is compared with the recommended one.

Each job is stored in a folder, and is not run again: after an interruption, start the same command again. Takes 25
minutes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np

from benchmarks.harness.machine import ROOT
from benchmarks.harness.processes import Scratch, ckptless_run, scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count, console
from benchmarks.harness.scenario import OURS, Scenario, running
from benchmarks.harness.table import Column, Table
from benchmarks.harness.watch import START_S, NoRecoveryError, Watch
from lightning_ckptless.cli.forecast_measured import measured_in
from lightning_ckptless.cli.runs import Run
from lightning_ckptless.cli.time_spent import run_time
from lightning_ckptless.ledger import LEDGER_NAME, Event, read_ledger
from lightning_ckptless.protocol.forecast.failure_model import SECONDS_PER_DAY, Gaps, Incident
from lightning_ckptless.protocol.forecast.inputs import forecastable, inputs_from
from lightning_ckptless.protocol.forecast.job import Job
from lightning_ckptless.protocol.forecast.simulation import simulate
from lightning_ckptless.protocol.time_account import Bucket

RANKS = 3
PACE_S = 0.1
END_S = 600.0
NO_LIMITS = {"max_recoveries_without_progress": 10**6, "max_recoveries_per_hour": 10**6}
DRAWS = 300
"""Number of simulated jobs from which the expected goodput of a model is computed."""
WITHIN_S = 1.0
"""Time between the two losses of a burst, at most."""
MODELS = ("exponential", "Weibull, k = 0.6", "bursts of two")
MTBF_S = (2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 35.0, 60.0)
INTERVALS = (1, 2, 5, 10)
GRID_SEEDS = (7, 8)
GRID_MTBF_S = 5.0
TARGET, GRID_TARGET = 0.02, 0.005
POSITIONS = 50
"""Number of simulated jobs over which the forecast for known failures is averaged."""
Found = dict[str, Any]
Kills = list[tuple[float, int]]
"""Pairs (seconds since the first batch, rank)."""


@dataclass(frozen=True)
class Trial:
    """A job that is run.

    Args:
        name: name of its file.
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
        shape = 0.6 if self.model == MODELS[1] else 1.0
        found: Kills = []
        for at in Gaps(self.mtbf_s, shape).draw(chance, horizon_s):
            first, second = chance.permutation(RANKS)[:2]
            found.append((at, int(first)))
            if self.model == MODELS[2]:
                found.append((at + WITHIN_S * float(chance.random()), int(second)))
        return sorted(found)


def trials(count: int) -> list[Trial]:
    """Return the jobs of the comparison: all models at all rates, again with other seeds while more are wanted."""
    combinations = [(model, mtbf_s) for mtbf_s in MTBF_S for model in MODELS]
    return [
        Trial(f"trial-{number}", *combinations[number % len(combinations)], seed=100 + number)
        for number in range(count)
    ]


CALIBRATION = (
    Trial("calibration", "regular", 4.0, seed=1),
    Trial("calibration-relaunch", "regular", 8.0, seed=2, in_place=False),
)
GRID = tuple(
    Trial(f"grid-{every}-{seed}", MODELS[0], GRID_MTBF_S, every, seed) for seed in GRID_SEEDS for every in INTERVALS
)


# ---------------------------------------------------------------------- one job


def train(trial: Trial, steps: int, place: Scratch) -> tuple[Run, Kills]:
    """Run a job, kill its ranks, and return its ledger and the failures that hit it."""
    command = ckptless_run("--max-restarts=1000000", *([] if trial.in_place else ["--no-in-place"]))
    job = OURS.but(devices=RANKS, pace_s=PACE_S, strategy_options={"mirror_every_n_steps": trial.every, **NO_LIMITS})
    with running(Scenario(trial.name, command, job), place, trial.name, steps=steps) as (watch, folder):
        hits = kill(watch, trial.kills(END_S))
        watch.until_end(END_S)
    [ledger] = folder.glob(f"runs/*/{LEDGER_NAME}")
    return Run(ledger.parent.name, ledger.parent, read_ledger(ledger).events), hits


def kill(watch: Watch, kills: Kills) -> Kills:
    """Kill the newest process of each rank at its instant until the job is over, and return the kills that hit one."""
    lives = watch.until(lambda lives: all("train" in life.moments for life in lives), START_S, "the first batch")
    began_at, hits = max(life.moments["train"] for life in lives), Kills()
    for after_s, rank in kills:
        watch.follow(began_at + after_s - time.time())
        if not watch.command.running or any("done" in life.moments for life in watch.now()):
            break
        if not watch.lives[watch.pids[rank]].is_over:
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


def forecast_of(job: Job, kills: Kills, span_s: float) -> float:
    """Return the forecast goodput of a job that is hit by these failures, averaged over their positions in a segment.

    How much a failure undoes depends on its position between two versions. A job drifts by a few per cent of a step
    per step, so after some seconds the position does not follow from the instant.
    """
    known = [at_s for at_s, _ in kills if at_s < span_s]
    shifts = np.random.default_rng(0).uniform(-0.5, 0.5, (POSITIONS, len(known))) * job.segment.total_s
    instants = np.sort(np.maximum(0.0, known + shifts))
    return mean(simulate(job, [Incident(at_s, (), ()) for at_s in drawn], span_s).ettr for drawn in instants.tolist())


def expected_of(trial: Trial, job: Job, span_s: float) -> tuple[float, float]:
    """Return the mean goodput of jobs of this length under the model, and its standard deviation."""
    draws = [replace(trial, seed=10_000 + number).kills(span_s) for number in range(DRAWS)]
    found = [simulate(job, [Incident(at_s, (), ()) for at_s, _ in kills], span_s).ettr for kills in draws]
    return mean(found), stdev(found)


def compare(trial: Trial, run: Run, kills: Kills, costs: Found) -> Found:
    """Return what a job has measured, and both forecasts."""
    goodput, span_s = measured_goodput(run.events)
    job = job_of(costs, trial.every, trial.mtbf_s)
    expected, spread = expected_of(trial, job, span_s)
    return {
        **asdict(trial),
        "kills": kills,
        "span_s": span_s,
        "goodput": goodput,
        "forecast": forecast_of(job, kills, span_s),
        "expected": expected,
        "spread": spread,
        "seconds": {str(bucket): spent_s for bucket, spent_s in run_time(run.events).account.seconds.items()},
    }


# ---------------------------------------------------------------------- measurement


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Calibrate, then run all jobs that are not stored yet, and store each."""
    args.folder.mkdir(parents=True, exist_ok=True)
    grid = GRID[:: len(GRID) - 1] if args.quick else GRID
    wanted = [*trials(args.jobs), *grid]
    steps.expect(len(CALIBRATION) + len(wanted))
    with scratch() as place:
        costs = results["costs"] = _calibrated(args, steps, place)
        results |= {"trials": [], "grid": []}
        for trial in wanted:
            steps.begin(f"{trial.name}: {trial.model}, {trial.mtbf_s:g} s between failures")
            stored = args.folder / f"{trial.name}.json"
            if not stored.exists():
                run, kills = train(trial, args.steps, place)
                stored.write_text(json.dumps(compare(trial, run, kills, costs)))
            results["grid" if trial in GRID else "trials"].append(json.loads(stored.read_text()))
            steps.done()
    results["recommended"] = job_of(costs, "auto", GRID_MTBF_S).choices.mirror_every_n_steps
    if args.plot:
        from benchmarks.plots import draw_goodput  # noqa: PLC0415 - matplotlib is optional

        draw_goodput(results["trials"], MODELS, args.plot)


def _calibrated(args: Namespace, steps: Steps, place: Scratch) -> Found:
    """Return the inputs of the forecast that the calibration runs have measured."""
    stored = args.folder / "calibration.json"
    costs: Found = {}
    for trial in CALIBRATION:
        steps.begin(trial.name)
        if not stored.exists():
            found = measured_in(train(trial, args.steps, place)[0])
            names = ("step_s", "data_wait_s", "version_s", "in_place_s") if trial.in_place else ("relaunch_s",)
            costs |= {name: found[name][0] for name in names}
        steps.done()
    if not stored.exists():
        stored.write_text(json.dumps(costs))
    read: Found = json.loads(stored.read_text())
    return read


# ---------------------------------------------------------------------- results


def off(row: Found) -> float:
    """Measured goodput minus the forecast for the same failures."""
    return float(row["goodput"] - row["forecast"])


def tables(args: Namespace, results: Results) -> list[Table]:  # noqa: ARG001 - the signature of tables
    """Return the table of jobs and that of mirror intervals."""
    rows, costs = results["trials"], results["costs"]
    apart = [abs(off(row)) for row in rows]
    worst = max(rows, key=lambda row: abs(off(row)))
    verdict = "met" if median(apart) <= TARGET else "missed"
    notes = [
        f"Measured minus forecast, absolute: median {median(apart):.2%} (target {TARGET:.0%}): {verdict}",
        f"Worst: {max(apart):.2%} ({worst['model']}, {worst['mtbf_s']:g} s)",
        f"Beyond two standard deviations of the expected goodput: {_outside(rows)} of {len(rows)}",
        "Calibrated: " + ", ".join(f"{name} = {1e3 * value:.1f} ms" for name, value in costs.items()),
    ]
    jobs = Table.of(
        "Goodput from the first batch to the last: measured, and forecast from the calibration runs", rows,
        Column("failures", "model"), Column("mean time between s", "mtbf_s", "g"),
        Column("killed", lambda row: len(row["kills"])), Column("s", "span_s", ".0f"),
        Column("measured", "goodput", ".1%"), Column("forecast for these failures", "forecast", ".1%"),
        Column("difference", off, "+.2%"),
        Column("expected of the model", lambda row: f"{row['expected']:.1%} ± {row['spread']:.1%}"), notes=notes,
    )  # fmt: skip
    grid, recommended = _by_interval(results["grid"]), results["recommended"]
    best = max(grid, key=lambda row: row["goodput"])
    of_recommended = [row for row in grid if row["every"] == recommended]
    note = f"Recommended: {recommended}"
    if of_recommended:
        behind = best["goodput"] - of_recommended[0]["goodput"]
        verdict = "met" if behind <= GRID_TARGET else "missed"
        note += f", {behind:.2%} below the best, {best['every']} (target {GRID_TARGET:.1%}): {verdict}"
    intervals = Table.of(
        f"Goodput by mirror interval, with the same failures every {GRID_MTBF_S:g} s on average", grid,
        Column("mirror_every_n_steps", "every"), Column("jobs", "jobs"), Column("killed", "killed"),
        Column("measured", "goodput", ".1%"), Column("forecast", "forecast", ".1%"), Column("difference", off, "+.2%"),
        notes=[note],
    )  # fmt: skip
    return [jobs, intervals]


def _by_interval(rows: Sequence[Found]) -> list[Found]:
    """Return the means of all jobs with the same mirror interval."""
    found = []
    for every in sorted({row["every"] for row in rows}):
        same = [row for row in rows if row["every"] == every]
        means = {name: mean(row[name] for row in same) for name in ("goodput", "forecast")}
        found.append({"every": every, "jobs": len(same), "killed": sum(len(row["kills"]) for row in same), **means})
    return found


def _outside(rows: Sequence[Found]) -> int:
    return sum(abs(row["goodput"] - row["expected"]) > 2 * row["spread"] for row in rows)


def add_options(parser: ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_count(parser, "--jobs", Default(24, 2), "jobs that are compared")
    add_count(parser, "--steps", Default(250, 80), "steps of a job, 0.1 s each")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "goodput", help="folder of the stored jobs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw measured over forecast goodput (.svg or .png)")


PROGRAM = Program(__doc__, measure, tables, add_options, shows_parts=False)

if __name__ == "__main__":
    try:
        PROGRAM.main()
    except NoRecoveryError as error:
        console.print(str(error), markup=False)
        sys.exit(1)
