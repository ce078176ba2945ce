"""What grows with the number of ranks: start, versions, recovery, and what each rank needs of the machine.

The same small model trains on 8 to 64 ranks of one machine, each with a copy of its shard on another rank. One rank is
killed. Every rank's file descriptors, threads, memory and messages are counted. If there are more ranks than cores,
all times contain the wait for a core; the counts do not depend on it.
"""

from __future__ import annotations

import random
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.harness.kills import LEDGER_S, STEP_S, Kill, Scenario, job, recoveries_of
from benchmarks.harness.processes import Scratch, ckptless_run, scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count, console
from benchmarks.harness.table import Column, Table
from benchmarks.harness.watch import NoRecoveryError, Watch, kill_one
from benchmarks.harness.wire import Note
from benchmarks.jobs.job import JobOptions

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


# ---------------------------------------------------------------------- measuring


@dataclass
class CensusWatch(Watch):
    """A watch that keeps what the ranks report of their rounds, by process id."""

    reports: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def take(self, note: Note) -> None:
        super().take(note)
        if note.moment == "rounds":
            self.reports.setdefault(note.pid, []).append(note.fields)

    def of_ranks(self) -> list[list[dict[str, Any]]]:
        """Return the reports of the newest process of each rank."""
        return [self.reports.get(pid, []) for pid in self.pids.values()]

    def until_reports(self, count: int, timeout_s: float) -> list[list[dict[str, Any]]]:
        """Follow the job until every rank has reported `count` times."""
        self.until(lambda _: min(map(len, self.of_ranks())) >= count, timeout_s, f"{count} reports of all ranks")
        return self.of_ranks()


def scenario_of(ranks: int) -> Scenario:
    """Return the job of a number of ranks, with replicas on other ranks, a standby, and counters in every rank."""

    def command(options: JobOptions) -> list[str]:
        return ckptless_run()(options.but(census=True))

    options = {"standbys": 1, "failure_domain": "rank"}
    return Scenario(f"{ranks} ranks", command, ranks=ranks, every=EVERY_STEPS, strategy_options=options)


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


def traffic_of(reports: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return what a rank sends per version, from two consecutive reports without a fault between them."""
    before, after = reports[-2], reports[-1]
    versions = len(after["rounds_s"]["round"])
    return {kind: (count - before["counts"].get(kind, 0)) / versions for kind, count in after["counts"].items()}


def measure_world(ranks: int, args: Namespace, place: Scratch, chance: random.Random) -> Row:
    """Start a job, count, and kill ranks of it `args.repeats` times."""
    scenario = scenario_of(ranks)
    with job(scenario, args.size, place, f"scale-{ranks}") as (plain, folder):
        watch = CensusWatch(plain.inbox, plain.command, ranks)
        lives = watch.until(lambda lives: min(life.first_step for life in lives) > 0, args.timeout, "a first step")
        row: Row = {"ranks": ranks, "start_s": max(life.steps[1] for life in lives) - plain.command.began_at}
        reports = watch.until_reports(REPORTS, args.timeout)
        # A rank's own round lasts until it has learned of the commit; all ranks of a round are included.
        rounds = [of_rank[-1]["rounds_s"] for of_rank in reports]
        row |= {f"{part}_s": [s for of_rank in rounds for s in of_rank[part]] for part in rounds[0]}
        row |= {"traffic": [*map(traffic_of, reports)], "step_s": max(life.step_s for life in watch.now())}
        row |= {"use": [*map(use_of, watch.pids.values())], "free_mib": psutil.virtual_memory().available / _MIB}
        gathers = _gathers(watch)
        row["kills"] = kills_of(watch, scenario, args, chance, folder)
        with suppress(NoRecoveryError):
            for of_rank in watch.reports.values():
                of_rank.clear()
            watch.until_reports(1, args.timeout)
            row["gathers"] = [count / len(row["kills"]) for count in _difference(_gathers(watch), gathers)]
    return row


def kills_of(watch: Watch, scenario: Scenario, args: Namespace, chance: random.Random, folder: Path) -> list[Kill]:
    """Kill ranks of a job, and return what each recovery took, with its phases according to the ledger."""
    found: list[Kill] = []
    for _ in range(args.repeats):
        try:
            kill = kill_one(watch, chance, every_n_steps=scenario.every, within_s=STEP_S, timeout_s=args.timeout)
        except NoRecoveryError as error:
            console.print(f"{scenario.name}: {error}", markup=False)
            return [*found, {"failed": str(error)}]
        found.append({name: kill[name] for name in ("seconds", "step_s", "repeated_steps", "victim")})
    with suppress(NoRecoveryError):
        watch.until(lambda _: len(recoveries_of(folder)) >= len(found), LEDGER_S, "the ledger's last recovery")
    for kill, account in zip(found, recoveries_of(folder), strict=False):
        kill["phases"] = account["phases"]
    return found


def _gathers(watch: CensusWatch) -> dict[int, int]:
    return {pid: found[-1]["counts"].get("gathers", 0) for pid, found in watch.reports.items() if found}


def _difference(after: dict[int, int], before: dict[int, int]) -> list[int]:
    """Return how much the counts of the processes that are in both have grown."""
    return [count - before[pid] for pid, count in after.items() if pid in before]


def room_for(ranks: int, row: Row) -> str | None:
    """Return why a world does not fit into memory, judged by a smaller one; None if it does."""
    each_mib = median(use["uss_mib"] for use in row["use"])
    free_mib = psutil.virtual_memory().available / _MIB
    needed_mib = STARTED_ONCE_MIB + ranks * each_mib
    spare_mib = FREE_FRACTION * psutil.virtual_memory().total / _MIB
    if needed_mib + spare_mib <= free_mib:
        return None
    fits = int((free_mib - spare_mib - STARTED_ONCE_MIB) / each_mib)
    return (
        f"{ranks} ranks of {each_mib:.0f} MiB each do not fit into the {free_mib:.0f} MiB that are available: "
        f"{fits} ranks would"
    )


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
    return [kill for kill in row["kills"] if "failed" not in kill]


def of_kills(quantity: str) -> Any:
    return lambda row: [kill[quantity] for kill in survived(row)]


def of_phases(*names: str) -> Any:
    return lambda row: [sum(kill["phases"][name] for name in names) for kill in survived(row) if "phases" in kill]


def of_use(quantity: str) -> Any:
    return lambda row: [use[quantity] for use in row["use"]]


def of_traffic(kind: str) -> Any:
    return lambda row: [traffic.get(kind, 0.0) for traffic in row["traffic"]]


def in_ms(part: str) -> Any:
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
    Column("recovery s", of_kills("seconds"), ".2f", median),
    Column("regroup s", of_phases("regroup_s"), ".3f", median),
    Column("restore s", of_phases("restore_s"), ".3f", median),
    Column("replay s", of_phases("replay_s"), ".3f", median),
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
GROWTH: tuple[tuple[str, Any], ...] = (
    ("file descriptors", of_use("fds")),
    ("threads", of_use("threads")),
    ("USS MiB", of_use("uss_mib")),
    ("messages per version", of_traffic("messages")),
    ("bytes per version", of_traffic("message bytes")),
)
NEARLY_CONSTANT = 1.15
"""Growth over all worlds below which a quantity counts as constant."""
LAWS = ((1.4, "log N"), (2.8, "linear"), (5.6, "quadratic"))
"""The growth of the last doubling, as a multiple of that of the doubling before, up to which each law is named."""


def law_of(worlds: Sequence[Row], values: Any) -> str:
    """Name the growth of a quantity per rank, from the last three worlds, each of twice as many ranks."""
    last = [(row["ranks"], median(found)) for row in worlds[-3:] if (found := values(row))]
    if len(last) < 3:
        return "not measured"
    (few, low), (_, middle), (many, high) = last
    if high < low / NEARLY_CONSTANT:
        return "falls"
    if high <= low * NEARLY_CONSTANT:
        return "constant"
    doubling = (high - middle) / max(middle - low, 1e-9)
    name = next((law for most, law in LAWS if doubling <= most), "faster than quadratic")
    return f"linear, {(high - low) / (many - few):.3g} per rank" if name == "linear" else name


def growth_rows(worlds: Sequence[Row]) -> Iterable[tuple[str, str, str, str]]:
    """Yield each quantity with its value in the smallest and the largest world, and its law."""
    for name, values in GROWTH:
        low, high = (f"{median(found):.4g}" if (found := values(row)) else "" for row in (worlds[0], worlds[-1]))
        yield name, low, high, law_of(worlds, values)


def tables(_: Namespace, results: Results) -> list[Table]:
    worlds = results["worlds"]
    first, last = worlds[0]["ranks"], worlds[-1]["ranks"]
    heads = ("quantity", f"{first} ranks", f"{last} ranks", "law")
    growth = Table.of(
        "Growth per rank",
        growth_rows(worlds),
        *(Column(head, itemgetter(at)) for at, head in enumerate(heads)),
    )
    return [
        Table.of("Times by number of ranks", worlds, *TIMES, notes=results["left_out"]),
        Table.of("Use and traffic of one rank, medians over the ranks", worlds, *USE, notes=[USE_NOTE]),
        growth,
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
