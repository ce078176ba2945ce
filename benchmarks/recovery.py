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
from benchmarks.harness.kills import Kill, survived
from benchmarks.harness.processes import ckptless_run, torchrun
from benchmarks.harness.report import Program, Results, Steps, console
from benchmarks.harness.scenario import OURS, Scenario, with_files
from benchmarks.harness.table import Column, Group, Table, count_of, each, name_of, p95, percentile, verdict
from benchmarks.rivals.environment import DEFAULT_PYTHON, RivalsMissingError, rivals, versions

RANKS = 4
EVERY = 20
JOB = OURS.but(devices=RANKS)
ours = partial(Scenario, job=JOB, every=EVERY)
STANDBY, IN_PLACE = "in place, standby", "in place, new process"
RELAUNCH, FRESH = "relaunch, preloaded", "relaunch, new interpreters"
SCENARIOS = (
    ours(STANDBY, ckptless_run(), job=JOB.but(strategy_options={"standbys": 1})),
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


def groups_of(results: Results) -> list[Group]:
    """Return the survived kills by scenario, with all kills as their context."""
    return [Group(name, survived(found), found) for name, found in results["kills"].items()]


def phase(quantity: str) -> Column:
    """Return the column of a phase, or of the total, according to the ledger."""

    def values(group: Group) -> list[float]:
        accounts = [item["ledger"] for item in group.items if "ledger" in item]
        return [(account["phases"] | account)[quantity] for account in accounts]

    return Column(quantity.removesuffix("_s"), values, ".2f" if quantity == "total_s" else ".3f", median)


def rank_0_survived(group: Group) -> str:
    found = [kill for kill in group.context if kill.get("victim") == 0]
    return f"{len(survived(found))} of {len(found)}"


def exact(group: Group) -> str | None:
    compared = [kill["exact"] for kill in group.items if "exact" in kill]
    return f"{sum(compared)} of {len(compared)}" if compared else None


def lost_steps(group: Group) -> list[int]:
    """Return the lost committed steps of each kill; without our strategy none are committed."""
    return [kill["lost_committed_steps"] for kill in group.items if "ddp" not in group.name]


HOW = Column("how", name_of)
KILLS = (
    HOW,
    Column("kills", lambda group: len(group.context)),
    Column("survived", count_of),
    Column("p50 s", each("seconds"), ".2f", median),
    Column("p95 s", each("seconds"), ".2f", p95),
    Column("max s", each("seconds"), ".2f", max),
    Column("one step s", each("step_s"), ".2f", median),
    Column("steps replayed p50", each("repeated_steps"), "g", median),
    Column("max", each("repeated_steps"), "g", max),
    Column("committed steps lost", lost_steps, of=sum),
    Column("exact", exact),
    Column("rank 0 survived", rank_0_survived),
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
    Column("kill to new script", each(span_s(None, "script")), ".3f", median),
    Column("imports", each(span_s("script", "imported")), ".3f", median),
    Column("model, trainer", each(span_s("imported", "fit")), ".3f", median),
    Column("fit to training", each(span_s("fit", "train")), ".3f", median),
    Column("first step", each(span_s("train", "step")), ".3f", median),
    Column("total", each("seconds"), ".2f", median),
)
MOMENTS_NOTE = (
    "fit to training: process group, restore, Lightning's setup. The sum of medians differs a little from the median "
    "of sums."
)


def verdicts(groups: list[Group]) -> Iterator[str]:
    """Yield the comparisons with the targets, in words."""
    for group in groups:
        what, quantity, targets = TARGETS.get(group.name, ("", seconds, {}))
        values = [value for kill in group.items if (value := quantity(kill)) is not None]
        for percent, target_s in targets.items() if values else ():
            yield f"{group.name}{what}, p{percent}: {verdict(percentile(values, percent), target_s, 's')}"


def kills_table(results: Results, ranks: int) -> Table:
    """Return the table of the times and the replayed steps."""
    groups, title = groups_of(results), f"SIGKILL of one of {ranks} ranks to the first step finished by all"
    notes = [*verdicts(groups), KILLS_NOTE]
    if installed := results.get("rivals"):
        notes.append("Other tools: " + ", ".join(map(" ".join, installed.items())) + ".")
    return Table.of(title, groups, *KILLS, notes=notes)


def phases_table(results: Results) -> Table:
    """Return the table of the phases according to the ledgers."""
    groups = [group for group in groups_of(results) if any("ledger" in kill for kill in group.items)]
    columns = [HOW, *map(phase, (*PHASES, "total_s"))]
    return Table.of("Phases according to the ledger, medians in s", groups, *columns, notes=[PHASES_NOTE])


def moments_table(results: Results) -> Table:
    """Return the table of the recovery as seen by the script, which is measured alike for all scenarios."""
    groups = [group for group in groups_of(results) if group.items]
    title = "The same as seen by the script, slowest rank, medians in s"
    return Table.of(title, groups, *MOMENTS, notes=[MOMENTS_NOTE])


def tables(_: Namespace, results: Results) -> list[Table]:
    return [kills_table(results, RANKS), phases_table(results), moments_table(results)]


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


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
