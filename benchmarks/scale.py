"""What grows with the number of ranks: start, versions, recovery, and what each rank needs of the machine.

The same small model trains on 2 to 64 ranks of one machine, each with a copy of its shard on another rank. One rank is
killed. Every rank's file descriptors, threads, memory and messages are counted. If there are more ranks than cores,
all times contain the wait for a core; the counts do not depend on it.
"""

from __future__ import annotations

import random
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.harness.kills import Kill, kill_repeatedly
from benchmarks.harness.kills import survived as survived_of
from benchmarks.harness.processes import Scratch, ckptless_run, scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count
from benchmarks.harness.scenario import OURS, Scenario, running
from benchmarks.harness.table import Column, Table
from benchmarks.harness.watch import NoRecoveryError, Watch

RANKS = (8, 16, 32, 64)
REPORTS = 2
"""Reports of every rank's traffic between which versions are counted."""
EVERY_STEPS = 3
FREE_FRACTION = 0.15
"""Part of the machine's memory that must stay free; a larger world is not started."""
STARTED_ONCE_MIB = 1000
"""Memory of the launcher, the fork server and the benchmark, roughly."""

_MIB = 2**20
Row = dict[str, Any]
Values = Callable[[Row], list[float]]


# ---------------------------------------------------------------------- measuring


def scenario_of(ranks: int) -> Scenario:
    """Return the job of a number of ranks, with replicas on other ranks, a standby, and counters in every rank."""
    options = OURS.but(devices=ranks, strategy_options={"standbys": 1, "failure_domain": "rank"}, census=True)
    return Scenario(f"{ranks} ranks", ckptless_run(), options, every=EVERY_STEPS)


def use_of(pid: int) -> dict[str, float]:
    """Return what a process uses of the machine; its memory without the pages that it shares with others is `uss`."""
    process = psutil.Process(pid)
    memory = process.memory_full_info()
    kinds = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    return {
        "fds": len(kinds),
        "sockets": sum(kind.startswith("socket:") for kind in kinds),
        "threads": process.num_threads(),
        "pss_mib": memory.pss / _MIB,
        "uss_mib": memory.uss / _MIB,
        "rss_mib": memory.rss / _MIB,
    }


def traffic_of(reports: Sequence[Row]) -> dict[str, float]:
    """Return what a rank sends per version, from two consecutive reports without a fault between them."""
    before, after = reports[-2], reports[-1]
    versions = len(after["rounds_s"]["round"])
    return {kind: (count - before["counts"].get(kind, 0)) / versions for kind, count in after["counts"].items()}


def until_reports(watch: Watch, count: int, timeout_s: float) -> list[list[Row]]:
    """Follow the job until every rank has reported `count` times, and return the reports of each rank."""
    awaited = f"{count} reports of all ranks"
    lives = watch.until(lambda lives: min(len(life.reports) for life in lives) >= count, timeout_s, awaited)
    return [life.reports for life in lives]


def measure_world(ranks: int, args: Namespace, place: Scratch, chance: random.Random) -> Row:
    """Start a job, count, and kill ranks of it `args.repeats` times."""
    scenario = scenario_of(ranks)
    with running(scenario, place, f"scale-{ranks}", size=args.size) as (watch, folder):
        started = max(life.steps[1] for life in watch.until_begun(args.timeout))
        row: Row = {"ranks": ranks, "start_s": started - watch.command.began_at}
        reports = until_reports(watch, REPORTS, args.timeout)
        # A rank's own round lasts until it has learned of the commit; all ranks of a round are included.
        rounds = [of_rank[-1]["rounds_s"] for of_rank in reports]
        row |= {f"{part}_s": [s for of_rank in rounds for s in of_rank[part]] for part in rounds[0]}
        row |= {"traffic": [*map(traffic_of, reports)], "step_s": max(life.step_s for life in watch.now())}
        row["use"] = [*map(use_of, watch.pids.values())]
        gathers = gathers_of(watch)
        row["kills"] = kill_repeatedly(watch, folder, scenario, args.repeats, chance, args.timeout)
        with suppress(NoRecoveryError):
            for life in watch.lives.values():
                life.reports.clear()
            until_reports(watch, 1, args.timeout)
            # Of the processes that were there before, too.
            grown = [count - gathers[pid] for pid, count in gathers_of(watch).items() if pid in gathers]
            row["gathers"] = [count / len(row["kills"]) for count in grown]
    return row


def gathers_of(watch: Watch) -> dict[int, int]:
    """Return the number of gathers of each process according to its last report."""
    return {pid: life.reports[-1]["counts"].get("gathers", 0) for pid, life in watch.lives.items() if life.reports}


def room_for(ranks: int, row: Row) -> str | None:
    """Return why a world does not fit into memory, judged by a smaller one; None if it does."""
    each_mib, memory = median(use["uss_mib"] for use in row["use"]), psutil.virtual_memory()
    spare_mib = memory.available / _MIB - FREE_FRACTION * memory.total / _MIB - STARTED_ONCE_MIB
    if ranks * each_mib <= spare_mib:
        return None
    return f"{ranks} ranks of {each_mib:.0f} MiB each do not fit into memory: {int(spare_mib / each_mib)} ranks would"


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Measure each number of ranks once, from the fewest to the most."""
    chance = random.Random(args.seed)
    steps.expect(len(args.ranks))
    results |= {"worlds": [], "left_out": []}
    with scratch() as place:
        for ranks in sorted(args.ranks):
            steps.begin(f"{ranks} ranks")
            done = results["worlds"]
            if done and (problem := room_for(ranks, done[-1])):
                results["left_out"].append(problem)
                continue
            done.append(measure_world(ranks, args, place, chance))
            steps.done()


# ---------------------------------------------------------------------- tables


def survived(row: Row) -> list[Kill]:
    return survived_of(row["kills"])


def of_phase(name: str) -> Values:
    return lambda row: [kill["ledger"]["phases"][f"{name}_s"] for kill in survived(row) if "ledger" in kill]


def of_use(quantity: str) -> Values:
    return lambda row: [use[quantity] for use in row["use"]]


def of_traffic(kind: str) -> Values:
    return lambda row: [traffic.get(kind, 0.0) for traffic in row["traffic"]]


def in_ms(part: str) -> Values:
    return lambda row: [1000 * seconds for seconds in row[f"{part}_s"]]


RANK_COUNT = Column("ranks", "ranks")
TIMES = (
    RANK_COUNT,
    Column("start s", "start_s", ".1f"),
    Column("step s", "step_s", ".3f"),
    Column("version ms", in_ms("round"), ".1f", median),
    Column("of it exchange ms", in_ms("exchange"), ".1f", median),
    Column("of it vote ms", in_ms("vote"), ".1f", median),
    Column("kills survived", lambda row: f"{len(survived(row))} of {len(row['kills'])}"),
    Column("recovery s", lambda row: [kill["seconds"] for kill in survived(row)], ".2f", median),
    *(Column(f"{name} s", of_phase(name), ".3f", median) for name in ("regroup", "restore", "replay")),
)
USE = (
    RANK_COUNT,
    Column("file descriptors", of_use("fds"), "g", median),
    Column("of them sockets", of_use("sockets"), "g", median),
    Column("threads", of_use("threads"), "g", median),
    Column("USS MiB", of_use("uss_mib"), ".1f", median),
    Column("PSS MiB", of_use("pss_mib"), ".1f", median),
    Column("RSS MiB", of_use("rss_mib"), ".1f", median),
    Column("messages per version", of_traffic("messages"), "g", median),
    Column("their bytes", of_traffic("message bytes"), ".0f", median),
    Column("votes", of_traffic("votes"), "g", median),
    Column("gathers per recovery", lambda row: row.get("gathers"), "g", median),
)
USE_NOTE = (
    "USS is the memory that a process shares with no other, PSS its part of all; the rest is shared with the fork "
    "server and the arena. Two of the gathers are only needed if the restored version lacks copies."
)


def tables(_: Namespace, results: Results) -> list[Table]:
    worlds = results["worlds"]
    return [
        Table.of("Times by number of ranks", worlds, *TIMES, notes=results["left_out"]),
        Table.of("Use and traffic of one rank, medians over the ranks", worlds, *USE, notes=[USE_NOTE]),
    ]


def options(parser: ArgumentParser) -> None:
    about = "numbers of ranks (default: %(default)s)"
    parser.add_argument("--ranks", type=int, nargs="+", default=[*RANKS], help=about)
    add_count(parser, "--repeats", Default(3, 1), "kills in each world")
    add_count(parser, "--seed", 1, "seed of the moments and victims")
    parser.add_argument("--size", default="tiny", help="model size (default: %(default)s)")
    about = "longest wait for a start, a report or a recovery, in seconds (default: %(default)g)"
    parser.add_argument("--timeout", type=float, default=600.0, help=about)


PROGRAM = Program(__doc__, measure, tables, options, shows_parts=True)

if __name__ == "__main__":
    PROGRAM.main()
