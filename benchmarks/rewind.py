"""How long it takes to rewind a run: from the decision of all ranks until training resumes, and the step after that.

A small GPT trains on two ranks. At every few steps a rank asks for a rewind to a target further and further back. The
ledger has the duration of each; the first version that is committed after it marks the end of the next step.
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.processes import Command, ckptless_run, job_environment, scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count
from benchmarks.harness.table import Column, Table, verdict
from benchmarks.harness.wire import Inbox
from benchmarks.jobs.job import JobOptions
from lightning_ckptless import environment
from lightning_ckptless.ledger import LEDGER_NAME, read_ledger

HISTORY, HISTORY_EVERY = 16, 4
FIRST_STEP = HISTORY * HISTORY_EVERY + 8
"""The first step at which the history is full."""
TARGET_S = 0.5


def depths(count: int) -> list[int]:
    """Return how far back each rewind goes, in steps: evenly up to the whole history."""
    return [max(1, round((index + 1) * HISTORY * HISTORY_EVERY / count)) for index in range(count)]


def faults_of(wanted: list[int]) -> str:
    """Return the rewinds as faults. Each is asked for when the history is full again."""
    steps = [FIRST_STEP + index * (FIRST_STEP + 2) for index in range(len(wanted))]
    return ",".join(f"rewind:step={step}:to={step - depth}" for step, depth in zip(steps, wanted, strict=True))


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Train once with all rewinds, and read them from the ledger."""
    wanted = depths(args.repeats)
    last = FIRST_STEP + len(wanted) * (FIRST_STEP + 2)
    strategy: dict[str, Any] = {"history": HISTORY, "history_every": HISTORY_EVERY}
    job = JobOptions(size=args.size, strategy="ckptless", strategy_options=strategy, steps=last)
    steps.expect(len(wanted))
    steps.begin(f"{args.size}: {len(wanted)} rewinds of {wanted[0]} to {wanted[-1]} steps")
    with scratch() as folders, tempfile.TemporaryDirectory(prefix="ckptless-") as short:
        with Inbox(Path(short) / "socket") as inbox:
            variables = {
                **job_environment(inbox.path),
                environment.FAULTS: faults_of(wanted),
                environment.RUN_ROOT: str(folders.files / "runs"),
                environment.ARENA_DIR: str(folders.arenas),
            }
            with Command(ckptless_run()(job), folders.files, variables) as command:
                while command.running:
                    inbox.next(0.5)
                if command.wait(1.0):
                    raise RuntimeError(f"the job has failed:\n{command.output_tail()}")
        [ledger] = (folders.files / "runs").glob(f"*/{LEDGER_NAME}")
        results["rewinds"] = [
            {"depth": event.fields["from_step"] - int(event.fields["version"].split()[1]), **event.fields}
            for event in read_ledger(ledger, only="rewind")
        ]
    steps.done(len(wanted))


def tables(args: Namespace, results: Results) -> list[Table]:
    """Return the table of all rewinds."""
    rewinds = results["rewinds"]
    columns = (
        Column("steps back", lambda rewind: str(rewind["depth"])),
        Column("from step", lambda rewind: str(rewind["from_step"])),
        Column("to", lambda rewind: rewind["version"]),
        Column("s", lambda rewind: f"{rewind['took_s']:.3f}"),
    )
    times = [rewind["took_s"] for rewind in rewinds]
    notes = [
        f"median {median(times):.3f} s, longest {max(times):.3f} s",
        f"Longest: {verdict(max(times), TARGET_S, ' s')}",
    ]
    return [Table.of(f"Rewinds of the {args.size} model on two ranks", rewinds, *columns, notes=notes)]


def options(parser: ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--size", default="10M", help="model size (default: %(default)s)")
    add_count(parser, "--repeats", Default(8, 2), "number of rewinds")


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
