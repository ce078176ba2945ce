"""What the fixed cost of a version consists of: two ranks train the smallest model, with and without a profiler.

The jobs alternate in short segments. The profile counts calls and adds up times by the files of the package, each with
the built-in functions that it calls. The profiler makes every call slower, so its times are shares rather than costs.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from statistics import median
from typing import Any

from benchmarks.harness.processes import scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count
from benchmarks.harness.table import Column, Table, verdict
from benchmarks.harness.turns import Plan, train_in_turns
from benchmarks.harness.variants import Variant, cpu_ms
from benchmarks.jobs.job import JobOptions
from benchmarks.steady_state import CKPTLESS, DDP, busy_ms

PROFILED = "profiled"
TARGETS_MS = {"training thread": 0.3, "all threads, CPU over ddp": 1.0, "step over ddp": 1.0}
_LEAST_SHARE = 0.01


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Let the three jobs train in turns."""
    ddp = JobOptions(args.size, 2, DDP)
    ours = ddp.but(strategy=CKPTLESS)
    with scratch() as place:
        jobs = {DDP: ddp, CKPTLESS: ours, PROFILED: ours.but(profiled=True)}
        steps.expect(args.rounds * len(jobs))
        steps.begin(f"{args.size}, alternating")
        plan = Plan(args.rounds, (args.steps, args.steps))
        results["segments"] = train_in_turns(jobs, place, plan, steps.done)


def tables(args: Namespace, results: Results) -> list[Table]:
    """Return the costs, and one profile per thread."""
    segments: dict[str, list[Any]] = results["segments"]
    ours = Variant(args.size, 2, CKPTLESS, segments[CKPTLESS], segments[DDP])
    found = {
        "training thread": busy_ms(ours),
        "training thread, CPU": busy_ms(ours, "cpu_"),
        "mirror thread, CPU": ours.median_ms("mirror_cpu_s"),
        "all threads, CPU over ddp": median(ours.over_ms(cpu_ms)),
        "step over ddp": median(ours.over_ms()),
        "step of ddp": median(map(ours.step, ours.base)),
    }
    costs = Table("Cost of a version, medians in ms", ("quantity", "ms", "target"))
    for name, cost_ms in found.items():
        target = verdict(cost_ms, TARGETS_MS[name], "ms") if name in TARGETS_MS else ""
        costs.rows.append((name, f"{cost_ms:.2f}", target))
    threads = dict.fromkeys(name for segment in segments[PROFILED] for name in segment["ranks"][0]["profiles"])
    return [costs, *(profile_of(thread, segments[PROFILED]) for thread in threads)]


def profile_of(thread: str, segments: list[Any]) -> Table:
    """Return the profile of one thread on rank 0, with the files that take most of the time first."""
    ranks = [segment["ranks"][0] for segment in segments]
    versions, parts = sum(rank["versions"] for rank in ranks), dict[str, list[float]]()
    for rank in ranks:
        for name, counts in rank["profiles"][thread].items():
            parts[name] = [a + b for a, b in zip(parts.get(name, [0, 0, 0.0]), counts, strict=True)]
    total = [sum(column) for column in zip(*parts.values(), strict=True)]
    rows = sorted(parts.items(), key=lambda part: -part[1][2])
    shown = [("all", total), *(row for row in rows if row[1][2] >= _LEAST_SHARE * total[2])]
    return Table.of(
        f"Profile of the {thread}, rank 0, per version",
        shown,
        Column("file", lambda row: row[0]),
        Column("functions called", lambda row: row[1][0] / versions, ".1f"),
        Column("built-in functions called", lambda row: row[1][1] / versions, ".1f"),
        Column("us, profiled", lambda row: 1e6 * row[1][2] / versions, ".0f"),
        Column("share", lambda row: row[1][2] / total[2], ".0%"),
    )


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--size", default="tiny", help="model size (default: %(default)s)")
    add_count(parser, "--steps", Default(150, 20), "steps of a segment")
    add_count(parser, "--rounds", Default(6, 1), "segments of each job")


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
