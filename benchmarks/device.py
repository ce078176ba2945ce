"""The cost of mirroring every step on a CUDA device, compared with Lightning's `ddp`: one rank, alternating.

A device computes asynchronously, so the step time is the time of a segment until all its work is done, divided by the
number of steps.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial
from statistics import median

import torch

from benchmarks.harness.processes import scratch
from benchmarks.harness.report import Program, Results, Steps, add_count, console
from benchmarks.harness.table import Column, Table
from benchmarks.harness.turns import alternate, running, segment_of
from benchmarks.jobs.gpt import WIDTHS
from benchmarks.jobs.job import JobOptions
from benchmarks.steady_state import CKPTLESS, DDP, NAMES, OPTIONS, STEP, Segment, Variant, part, results_of, variants_of

EVERY_TENTH = "mirror_every_n_steps=10"
SIZES = ("33M", "124M", "345M")
WARM_UP_STEPS = 10


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Train every size with `ddp` and with our strategy, alternating."""
    results["pairs"] = []
    steps.expect(3 * args.rounds * len(args.sizes))
    for size in args.sizes:
        steps.begin(f"{size}, batch {args.batch}")
        with scratch() as place:
            ddp = JobOptions(size, args.batch, devices=1, accelerator="gpu", turns=True, root=str(place.files))
            ours = ddp.but(strategy=CKPTLESS)
            jobs = {DDP: ddp, CKPTLESS: ours, EVERY_TENTH: ours.but(strategy_options=OPTIONS[EVERY_TENTH])}
            with running(jobs, place) as started:
                for job in started.values():
                    job.train(WARM_UP_STEPS)
                segment = partial(segment_of, steps=args.steps, warm_up=0)
                segments = alternate(started, args.rounds, segment, steps.done)
                results["pairs"].append(results_of(size, args.batch, segments))


def mean_ms(segment: Segment) -> float:
    """Return the mean step of a segment in ms, until all work on the device is done."""
    return float(1e3 * segment["ranks"][0]["mean_s"])


def copy_gb_per_s(variant: Variant) -> float | None:
    staged_ms = variant.part_ms("stage_s")
    return variant.shard_mb / median(staged_ms) if staged_ms else None


COLUMNS = (
    *NAMES,
    Column("state MB", lambda variant: variant.state_mb, ".0f"),
    *(column for column in STEP[len(NAMES) :] if column.head in {"step ms", "over ddp ms", "over ddp"}),
    part("training thread ms", "commit_s"),
    part("copied after ms", "stage_s", ".1f"),
    Column("copy GB/s", copy_gb_per_s, ".1f"),
)
NOTE = (
    "Step: mean of a segment until all work on the device is done, median over segments. Training thread: its time per "
    "version. Copied after: from the commit point until the version is in shared memory, including the wait for the "
    "device to reach that point. One rank keeps no replicas, so nothing is sent."
)


def tables(_: Namespace, results: Results) -> list[Table]:
    variants = [variant for pair in results["pairs"] for variant in variants_of(pair, mean_ms)]
    return [Table.of("Step time on one device, one rank, alternating", variants, *COLUMNS, notes=[NOTE])]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(WIDTHS), help="model sizes")
    add_count(parser, "--batch", 64, "samples per step")
    add_count(parser, "--steps", 40, "steps per segment")
    add_count(parser, "--rounds", 6, "segments per strategy")


PROGRAM = Program(__doc__, measure, tables, options)


def main() -> None:
    PROGRAM.parse()
    if not torch.cuda.is_available():
        console.print("needs a CUDA device: torch finds none here")
        raise SystemExit(2)
    PROGRAM.main()


if __name__ == "__main__":
    main()
