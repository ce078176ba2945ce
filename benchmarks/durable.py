"""The cost of durable states to training, and the time until one is on disk, compared with torch's `async_save`.

Two ranks of the same job train under each variant. The variants run at the same time and alternate in short segments.
Each writes the same state to the same disk equally often: the durable writer reads the arena while training continues;
`torch.distributed.checkpoint.async_save` copies the state in the training thread and writes it in another thread.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.harness.processes import scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count, console
from benchmarks.harness.table import Column, Table
from benchmarks.harness.turns import JobLostError, TurnsJob, alternate, running
from benchmarks.jobs.async_save import saves_of
from benchmarks.jobs.gpt import WIDTHS, state_bytes
from benchmarks.jobs.job import JobOptions
from lightning_ckptless.ledger import read_ledger

SIZES = ("tiny", "1M", "10M", "33M", "124M", "345M")
RANKS = 2
BATCH = 4
WARM_UP_STEPS = 2
IDLE_S = 0.3
"""A writer that has been idle for this long (seconds) does not disturb the next segment."""


# ---------------------------------------------------------------------- measurement


def variants(common: JobOptions, every: int) -> dict[str, JobOptions]:
    """Return the compared jobs; two of them write a state every `every` steps."""
    ours = common.but(strategy="ckptless")
    return {
        "ddp": common,
        "ddp, async_save": common.but(async_save_every=every),
        "ckptless": ours,
        "ckptless, durable": ours.but(strategy_options={"durable_every_n_steps": every}),
    }


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Train every size under each variant, alternating."""
    torch.set_num_threads(1)
    results |= {"every": 5 if args.quick else 10, "sizes": []}
    segment_steps = 15 if args.quick else 40
    steps.expect(args.rounds * 4 * len(args.sizes))

    def segment(job: TurnsJob) -> list[float]:
        notes = job.train(WARM_UP_STEPS + segment_steps)
        ranks = [note.fields["steps_s"][WARM_UP_STEPS:] for note in notes]
        _wait_until_idle(job.folder)
        return [max(step) for step in zip(*ranks, strict=True)]

    for size in args.sizes:
        steps.begin(f"{size}, 4 variants alternating")
        with scratch() as place:
            common = JobOptions(size, BATCH, devices=RANKS, turns=True, root=str(place.files))
            try:
                with running(variants(common, results["every"]), place) as jobs:
                    for job in jobs.values():
                        job.train(WARM_UP_STEPS + results["every"])
                    steps_s = alternate(jobs, args.rounds, segment, steps.done)
                    found = {n: {"steps_s": steps_s[n], "writes": _writes(job.folder)} for n, job in jobs.items()}
            except JobLostError as error:
                console.print(f"{size}: {error}", markup=False)
            else:
                results["sizes"].append({"size": size, "state_bytes": state_bytes(size), "variants": found})


def _wait_until_idle(folder: Path) -> None:
    """Wait until nothing is being written to disk."""

    def is_saving() -> bool:
        return any(path.is_dir() and not (path / ".metadata").exists() for path in (folder / "saves").glob("step-*"))

    idle_since = time.monotonic()
    while time.monotonic() - idle_since < IDLE_S:
        if any(folder.rglob(".step-*.part")) or is_saving():
            idle_since = time.monotonic()
        time.sleep(0.02)


def _writes(folder: Path) -> list[dict[str, float]]:
    """Return what the durable writer or the `async_save` callback has recorded of each state."""
    ledgers = folder.glob("*/ledger.jsonl")
    written = [event.fields for path in ledgers for event in read_ledger(path) if event.event == "durable_written"]
    names = ("copied_s", "blocked_s", "total_s", "bytes", "tries")
    return [{name: float(facts[name]) for name in names if name in facts} for facts in (*written, *saves_of(folder))]


# ---------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Row:
    """The measurements of a variant, and the steps of the same strategy without saving."""

    size: str
    state_bytes: int
    name: str
    steps_s: list[list[float]]
    without_s: list[list[float]]
    writes: list[dict[str, float]]

    @property
    def all_steps_ms(self) -> list[float]:
        return [1e3 * step for step in chain(*self.steps_s)]

    @property
    def over(self) -> list[float]:
        """Relative cost of saving, per round: the quotient of the mean steps, minus one; empty without saving."""
        pairs = zip(self.steps_s, self.without_s, strict=True)
        return [fmean(ours) / fmean(plain) - 1 for ours, plain in pairs] if "," in self.name else []


def rows_of(results: Mapping[str, Any]) -> list[Row]:
    return [
        Row(found["size"], found["state_bytes"], name, variant["steps_s"],
            found["variants"][name.partition(",")[0]]["steps_s"], variant["writes"])
        for found in results["sizes"]
        for name, variant in found["variants"].items()
    ]  # fmt: skip


def write_ms(name: str) -> Callable[[Row], list[float]]:
    return lambda row: [1e3 * write[name] for write in row.writes if name in write]


STEP = (
    Column("model", lambda row: row.size),
    Column("variant", lambda row: row.name),
    Column("step p50 ms", lambda row: row.all_steps_ms, ".1f", median),
    Column("mean ms", lambda row: row.all_steps_ms, ".1f", fmean),
    Column("slowest ms", lambda row: row.all_steps_ms, ".1f", max),
    Column("mean over the same without saving", lambda row: row.over, "+.1%", median),
)
WRITE = (
    Column("model", lambda row: row.size),
    Column("state MB", lambda row: row.state_bytes / 1e6, ".1f"),
    Column("variant", lambda row: row.name),
    Column("states", lambda row: len(row.writes)),
    Column("MB on disk", lambda row: [write["bytes"] / 1e6 for write in row.writes], ".1f", median),
    Column("training waits ms", lambda row: write_ms("blocked_s")(row) or [0.0], ".1f", median),
    Column("copied ms", write_ms("copied_s"), ".1f", median),
    Column("on disk after ms", write_ms("total_s"), ".1f", median),
)
STEP_NOTE = "Mean over: median over rounds of the quotient of the mean steps of neighbouring segments."
WRITE_NOTE = (
    "Training waits: in `async_save`, for the previous save and for the copy of the state. Copied: by the durable "
    "writer, from the arena, during training. Medians."
)


def tables(_: Namespace, results: Results) -> list[Table]:
    rows, state = rows_of(results), "One state, from the moment it is due until it is on disk"
    step = f"Step time with a state on disk every {results['every']} steps, {RANKS} CPU ranks, alternating"
    return [
        Table.of(step, rows, *STEP, notes=[STEP_NOTE]),
        Table.of(state, [row for row in rows if row.writes], *WRITE, notes=[WRITE_NOTE]),
    ]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(WIDTHS), help="model sizes")
    add_count(parser, "--rounds", Default(6, 2), "segments per variant")


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
