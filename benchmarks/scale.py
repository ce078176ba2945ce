"""What grows with the number of ranks: start, versions, recovery, and what each rank needs of the machine.

The same small model trains on 2 to 64 ranks of one machine, each with a copy of its shard on another rank. One rank is
killed. Every rank's file descriptors, threads, memory and messages are counted. If there are more ranks than cores,
all times contain the wait for a core; the counts do not depend on it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import psutil

from benchmarks.harness.benchmark import Benchmark, Results, Steps, option
from benchmarks.harness.kills import kill_repeatedly, phase_s, survived
from benchmarks.harness.processes import Scratch, ckptless_run, scratch
from benchmarks.harness.scenario import OURS, Scenario, running
from benchmarks.harness.table import Column, Table

REPORTS = 2
"""Reports of every rank's traffic between which versions are counted."""
TIMEOUT_S = 600.0
Row = dict[str, Any]


def scenario_of(ranks: int) -> Scenario:
    """Return the job of a number of ranks, with replicas on other ranks, a standby, and counters in every rank."""
    options = OURS.but(devices=ranks, strategy_options={"standbys": 1, "failure_domain": "rank"}, census=True)
    return Scenario(f"{ranks} ranks", ckptless_run(), options, every=3)


def use_of(pid: int) -> dict[str, float]:
    """Return what a process uses of the machine; its memory without the pages that it shares with others is `uss`."""
    process = psutil.Process(pid)
    return {
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": process.num_threads(),
        "uss_mib": process.memory_full_info().uss / 2**20,
    }


def traffic_of(before: Row, after: Row) -> dict[str, float]:
    """Return what a rank sends per version, from two consecutive reports without a fault between them."""
    versions = len(after["rounds_s"]["round"])
    return {kind: (count - before["counts"].get(kind, 0)) / versions for kind, count in after["counts"].items()}


def measure_world(ranks: int, kills: int, place: Scratch) -> Row:
    """Start a job, count, and kill ranks of it."""
    scenario = scenario_of(ranks)
    with running(scenario, place, f"scale-{ranks}", size="tiny") as (watch, folder):
        started = max(life.steps[1] for life in watch.until_begun(TIMEOUT_S))
        awaited = f"{REPORTS} reports of all ranks"
        lives = watch.until(lambda found: all(len(of.reports) >= REPORTS for of in found), TIMEOUT_S, awaited)
        # A rank's own round lasts until it has learned of the commit; all ranks of a round are included.
        rounds = [life.reports[-1]["rounds_s"] for life in lives]
        return {
            "ranks": ranks,
            "start_s": started - watch.command.began_at,
            "step_s": max(life.step_s for life in lives),
            **{f"{part}_s": [s for of_rank in rounds for s in of_rank[part]] for part in rounds[0]},
            "traffic": [traffic_of(*life.reports[-2:]) for life in lives],
            "use": [*map(use_of, watch.pids.values())],
            "kills": kill_repeatedly(watch, folder, scenario, kills, random.Random(1), TIMEOUT_S),
        }


# ---------------------------------------------------------------------- tables


def phase(name: str) -> Column:
    return Column(f"{name} s", lambda row: phase_s(survived(row["kills"]), f"{name}_s"), ".3f", median)


def ms(part: str) -> Callable[[Row], list[float]]:
    return lambda row: [1000 * seconds for seconds in row[f"{part}_s"]]


def of_ranks(kind: str, quantity: str) -> Callable[[Row], list[float]]:
    return lambda row: [of_rank.get(quantity, 0.0) for of_rank in row[kind]]


def survivor_cpu_s(row: Row) -> list[float]:
    """Return the CPU seconds of each survivor from a kill to the first step that all have finished."""
    return [seconds for kill in survived(row["kills"]) for seconds in kill["survivor_cpu_s"]]


TIMES = (
    Column("ranks", "ranks"),
    Column("start s", "start_s", ".1f"),
    Column("step s", "step_s", ".3f"),
    Column("version ms", ms("round"), ".1f", median),
    Column("of it exchange ms", ms("exchange"), ".1f", median),
    Column("of it vote ms", ms("vote"), ".1f", median),
    Column("kills survived", lambda row: f"{len(survived(row['kills']))} of {len(row['kills'])}"),
    Column("recovery s", lambda row: [kill["seconds"] for kill in survived(row["kills"])], ".2f", median),
    *map(phase, ("regroup", "restore", "replay")),
    Column("CPU s of a survivor", survivor_cpu_s, ".3f", mean),
)
USE = (
    Column("ranks", "ranks"),
    Column("file descriptors", of_ranks("use", "fds"), "g", median),
    Column("threads", of_ranks("use", "threads"), "g", median),
    Column("USS MiB", of_ranks("use", "uss_mib"), ".1f", median),
    Column("messages per version", of_ranks("traffic", "messages"), "g", median),
    Column("their bytes", of_ranks("traffic", "message bytes"), ".0f", median),
)
USE_NOTE = (
    "USS is the memory that a process shares with no other; the rest is shared with the fork server and the arena."
)


@dataclass
class Scale(Benchmark):
    ranks: tuple[int, ...] = option((8, 16, 32, 64), "numbers of ranks")
    repeats: int = option(3, "kills in each world", quick=1)

    def measure(self, results: Results, steps: Steps) -> None:
        steps.expect(len(self.ranks))
        results["worlds"] = []
        with scratch() as place:
            for ranks in sorted(self.ranks):
                steps.begin(f"{ranks} ranks")
                results["worlds"].append(measure_world(ranks, self.repeats, place))
                steps.done()

    def tables(self, results: Results) -> list[Table]:
        use = "Use and traffic of one rank, medians over the ranks"
        return [
            Table.of("Times by number of ranks", results["worlds"], *TIMES),
            Table.of(use, results["worlds"], *USE, notes=[USE_NOTE]),
        ]


if __name__ == "__main__":
    Scale.main()
