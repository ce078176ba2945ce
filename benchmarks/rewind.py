"""How long it takes to rewind a run: from the decision of all ranks until training resumes, and the step after that.

A small GPT trains on two ranks. At every few steps a rank asks for a rewind to a target further and further back. The
ledger has the duration of each; the first version that is committed after it marks the end of the next step.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from statistics import median

from benchmarks.harness.processes import ckptless_run, scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count
from benchmarks.harness.scenario import OURS, Scenario, events_of, running
from benchmarks.harness.table import Column, Table, verdict
from lightning_ckptless import environment

HISTORY, HISTORY_EVERY = 16, 4
FIRST_STEP = HISTORY * HISTORY_EVERY + 8
"""The first step at which the history is full."""
TARGET_S = 0.5


def depths(count: int) -> list[int]:
    """Return how far back each rewind goes, in steps: evenly up to the whole history."""
    return [max(1, round((index + 1) * HISTORY * HISTORY_EVERY / count)) for index in range(count)]


def scenario_of(wanted: list[int]) -> Scenario:
    """Return the job with the rewinds as faults. Each is asked for when the history is full again."""
    steps = [FIRST_STEP + index * (FIRST_STEP + 2) for index in range(len(wanted))]
    faults = ",".join(f"rewind:step={step}:to={step - depth}" for step, depth in zip(steps, wanted, strict=True))
    job = OURS.but(strategy_options={"history": HISTORY, "history_every": HISTORY_EVERY})
    return Scenario("rewind", ckptless_run(), job, {environment.FAULTS: faults})


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Train once with all rewinds, and read them from the ledger."""
    wanted = depths(args.repeats)
    last = FIRST_STEP + len(wanted) * (FIRST_STEP + 2)
    steps.expect(len(wanted))
    steps.begin(f"{args.size}: {len(wanted)} rewinds of {wanted[0]} to {wanted[-1]} steps")
    with scratch() as place, running(scenario_of(wanted), place, "job", size=args.size, steps=last) as (watch, folder):
        watch.until_end()
        results["rewinds"] = [
            {"depth": fields["from_step"] - int(fields["version"].split()[1]), **fields}
            for fields in events_of(folder, "rewind")
        ]
    steps.done(len(wanted))


COLUMNS = (
    Column("steps back", "depth"),
    Column("from step", "from_step"),
    Column("to", "version"),
    Column("s", "took_s", ".3f"),
)


def tables(args: Namespace, results: Results) -> list[Table]:
    """Return the table of all rewinds."""
    times = [rewind["took_s"] for rewind in results["rewinds"]]
    notes = [f"Median: {median(times):.3f} s", f"Longest: {verdict(max(times), TARGET_S, 's')}"]
    return [Table.of(f"Rewinds of the {args.size} model on two ranks", results["rewinds"], *COLUMNS, notes=notes)]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--size", default="10M", help="model size (default: %(default)s)")
    add_count(parser, "--repeats", Default(8, 2), "number of rewinds")


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
