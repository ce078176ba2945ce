"""SIGKILL of one rank to the first step that all ranks have finished: every kind of recovery, and other tools.

A small GPT trains on CPU ranks. A random rank, which may be rank 0, is killed repeatedly at random moments. All rows
are measured in one run, in alternating blocks. torchft and NVIDIA's resiliency extension are included if `make
bench-rivals` has installed them.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.harness import kills
from benchmarks.harness.kills import Kill, Scenario, survived, with_files
from benchmarks.harness.processes import ckptless_run, torchrun
from benchmarks.harness.report import Program, Results, Steps, console
from benchmarks.harness.table import Column, Table, percentile, verdict
from benchmarks.rivals.environment import DEFAULT_PYTHON, RivalsMissingError, rivals, versions

RANKS = 4
EVERY = 20
ours = partial(Scenario, ranks=RANKS, every=EVERY)
STANDBY, IN_PLACE = "in place, standby", "in place, new process"
RELAUNCH, FRESH = "relaunch, preloaded", "relaunch, new interpreters"
SCENARIOS = (
    ours(STANDBY, ckptless_run(), strategy_options={"standbys": 1}),
    ours(IN_PLACE, ckptless_run()),
    ours(RELAUNCH, ckptless_run("--no-in-place")),
    ours(FRESH, ckptless_run("--no-in-place", "--no-preload")),
    ours("torchrun, ckptless", torchrun),
    with_files(RANKS),
)


# ---------------------------------------------------------------------- quantities


def seconds(kill: Kill) -> float:
    return float(kill["seconds"])


def beyond_a_step_s(kill: Kill) -> float:
    return float(kill["seconds"] - kill["step_s"])


def own_share_s(kill: Kill) -> float | None:
    """Return the seconds of a recovery without the start of the slowest process and its imports.

    They are the time from the kill to the request for new processes, and from the end of the script's imports to the
    first step. The rest would pass with any launcher.
    """
    if "ledger" not in kill:
        return None
    spawned_s = kill["ledger"]["spawned_at"] - kill["killed_at"]
    return float(kill["seconds"] - (max(rank["imported"] for rank in kill["ranks"]) - spawned_s))


TARGETS: dict[str, tuple[str, Callable[[Kill], float | None], dict[int, float]]] = {
    STANDBY: (", in addition to one step", beyond_a_step_s, {50: 0.2, 95: 0.4}),
    IN_PLACE: ("", seconds, {50: 0.6, 95: 1.0}),
    RELAUNCH: ("", seconds, {50: 1.0, 95: 2.0}),
    FRESH: (", without process start and imports", own_share_s, {50: 0.3}),
}
"""By row: the quantity that is compared, and the targets of its percentiles in s."""


def span_s(start: str | None, end: str) -> Callable[[Kill], float]:
    """Return a function that returns the seconds between two moments of the slowest rank."""

    def span(kill: Kill) -> float:
        # A standby had done some of this before the kill.
        ends = [rank[end] for rank in kill["ranks"]]
        starts = [rank[start] for rank in kill["ranks"]] if start else []
        return float(max(0.0, *ends) - max(0.0, *starts, 0.0))

    return span


# ---------------------------------------------------------------------- tables

Row = tuple[str, list[Kill], list[Kill]]
"""Name, all kills, and those that were survived."""


def rows_of(results: Results) -> list[Row]:
    return [(name, found, survived(found)) for name, found in results["kills"].items()]


def over(quantity: Callable[[Kill], float], of: Callable[[list[float]], float] = median) -> Callable[[Row], object]:
    """Return the cell of a statistic over the survived kills."""
    return lambda row: of([quantity(kill) for kill in row[2]]) if row[2] else None


def phase(name: str) -> Column:
    def cell(row: Row) -> float:
        accounts = [kill["ledger"] for kill in row[2] if "ledger" in kill]
        return median((account["phases"] | account)[name] for account in accounts)

    return Column(name.removesuffix("_s"), cell, ".2f" if name == "total_s" else ".3f")


def survived_of(row: Row, victim: int) -> str:
    found = [kill for kill in row[1] if kill.get("victim") == victim]
    return f"{len(survived(found))} of {len(found)}"


def exact(row: Row) -> str | None:
    compared = [kill["exact"] for kill in row[2] if "exact" in kill]
    return f"{sum(compared)} of {len(compared)}" if compared else None


def lost_steps(row: Row) -> int | None:
    """Return the lost committed steps; without our strategy none are committed."""
    return sum(kill["lost_committed_steps"] for kill in row[2]) if row[2] and "ddp" not in row[0] else None


HOW = Column("how", lambda row: row[0])
KILLS = (
    HOW,
    Column("kills", lambda row: len(row[1])),
    Column("survived", lambda row: len(row[2])),
    Column("p50 s", over(seconds), ".2f"),
    Column("p95 s", over(seconds, lambda values: percentile(values, 95)), ".2f"),
    Column("max s", over(seconds, max), ".2f"),
    Column("one step s", over(lambda kill: kill["step_s"]), ".2f"),
    Column("steps replayed p50", over(lambda kill: kill["repeated_steps"]), "g"),
    Column("max", over(lambda kill: kill["repeated_steps"], max), "g"),
    Column("committed steps lost", lost_steps),
    Column("exact", exact),
    Column("rank 0 survived", lambda row: survived_of(row, 0)),
)
KILLS_NOTE = (
    "Steps replayed are steps that had been finished. A committed step is one that a rank has seen committed on all "
    "ranks. Exact: in the steps after the recovery, a checksum of weights and moments on all ranks equals that of the "
    "same step of an undisturbed run. The drill compares every bit."
)
PHASES = ("detect_s", "abort_s", "regroup_s", "restore_s", "replay_s", "other_s")
PHASES_NOTE = (
    "In place: detect ends when the agent has seen the exit, abort when the reporting rank has been notified, regroup "
    "when all ranks have met, restore when the state is in place, replay when the first new step is committed. "
    "Relaunch: abort ends when the survivors have exited, and regroup includes start and imports. torchrun's agent "
    "does not report exit times: its detection and stopping belong to no phase."
)
MOMENTS = (
    HOW,
    Column("kill to new script", over(span_s(None, "script")), ".3f"),
    Column("imports", over(span_s("script", "imported")), ".3f"),
    Column("model, trainer", over(span_s("imported", "fit")), ".3f"),
    Column("fit to training", over(span_s("fit", "train")), ".3f"),
    Column("first step", over(span_s("train", "step")), ".3f"),
    Column("total", over(seconds), ".2f"),
)
MOMENTS_NOTE = (
    "fit to training: process group, restore, Lightning's setup. The sum of medians differs a little from the median "
    "of sums."
)
STOCK = (
    Column("try", lambda row: row[0]),
    Column("recovered", lambda row: "no" if "failed" in row[1] else "yes"),
    Column("starts", lambda row: row[1].get("starts"), "g"),
    Column("s", lambda row: row[1].get("seconds"), ".1f"),
)
STOCK_NOTE = "Without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which is set for the table above."


def verdicts(rows: list[Row]) -> Iterator[str]:
    """Yield the comparisons with the targets, in words."""
    for name, _, good in rows:
        what, quantity, targets = TARGETS.get(name, ("", seconds, {}))
        values = [value for kill in good if (value := quantity(kill)) is not None]
        for percent, target_s in targets.items() if values else ():
            yield f"{name}{what}, p{percent}: {verdict(percentile(values, percent), target_s, 's')}"


def kills_table(results: Results, ranks: int) -> Table:
    """Return the table of the times and the replayed steps."""
    rows, title = rows_of(results), f"SIGKILL of one of {ranks} ranks to the first step finished by all"
    notes = [*verdicts(rows), KILLS_NOTE]
    if installed := results.get("rivals"):
        notes.append("Other tools: " + ", ".join(f"{name} {version}" for name, version in installed.items()) + ".")
    return Table.of(title, rows, *KILLS, notes=notes)


def phases_table(results: Results) -> Table:
    """Return the table of the phases according to the ledgers."""
    rows = [row for row in rows_of(results) if any("ledger" in kill for kill in row[2])]
    columns = [HOW, *map(phase, (*PHASES, "total_s"))]
    return Table.of("Phases according to the ledger, medians in s", rows, *columns, notes=[PHASES_NOTE])


def moments_table(results: Results) -> Table:
    """Return the table of the recovery as seen by the script, which is measured alike for all scenarios."""
    rows = [row for row in rows_of(results) if row[2]]
    title = "The same as seen by the script, slowest rank, medians in s"
    return Table.of(title, rows, *MOMENTS, notes=[MOMENTS_NOTE])


def stock_table(results: Results) -> Table:
    """Return the table of torchrun's relaunches with its default settings."""
    tries, notes = results["stock"], [STOCK_NOTE]
    if tries:
        bad = sum("failed" in kill or kill["starts"] > 1 for kill in tries)
        notes.append(f"{bad} of {len(tries)} tries did not recover with one restart within 60 s.")
    return Table.of("torchrun without changes", enumerate(tries, 1), *STOCK, notes=notes)


def all_tables(results: Results, ranks: int) -> list[Table]:
    return [kills_table(results, ranks), phases_table(results), moments_table(results), stock_table(results)]


# ---------------------------------------------------------------------- the program


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Kill ranks in all scenarios that are available here, and compare the recovered jobs with undisturbed ones."""
    scenarios, results["rivals"] = with_rivals(args.rivals_python.absolute())
    kills.measure(args, results, steps, scenarios)
    kills.compare(results["kills"], scenarios, args.size)


def with_rivals(python: Path) -> tuple[tuple[Scenario, ...], dict[str, str]]:
    """Return all scenarios that are available here, and the versions of the rivals' packages."""
    try:
        installed = versions(python)
    except RivalsMissingError as error:
        console.print(f"torchft and nvidia-resiliency-ext are not measured: {error}", markup=False)
        return SCENARIOS, {}
    return (*SCENARIOS, *rivals(python, RANKS, EVERY)), installed


def options(parser: ArgumentParser) -> None:
    kills.add_options(parser, (*SCENARIOS, *rivals(DEFAULT_PYTHON, RANKS, EVERY)), repeats=30, block=6)
    about = "Python of the environment that `make bench-rivals` sets up (default: %(default)s, if it exists)"
    parser.add_argument("--rivals-python", type=Path, default=DEFAULT_PYTHON, metavar="PATH", help=about)


PROGRAM = Program(__doc__, measure, lambda _, results: all_tables(results, RANKS), options)

if __name__ == "__main__":
    PROGRAM.main()
