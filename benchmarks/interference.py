"""The cost of the mirror thread to training on shared cores, and whether a lower scheduling priority reduces it.

Two ranks of the same job train on two cores under each variant: unmodified, with a nice level for the mirror thread,
under batch scheduling, and with one thread for its copies. The variants run at the same time and alternate in short
segments. Takes five minutes.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial

import torch

from benchmarks.harness.processes import scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count
from benchmarks.harness.table import Table
from benchmarks.harness.turns import alternate, running, segment_of
from benchmarks.jobs.gpt import WIDTHS
from benchmarks.jobs.job import JobOptions
from benchmarks.steady_state import CKPTLESS, DDP, RANKS, STEP, STEP_NOTE, WARM_UP_STEPS, part, results_of, variants_of

SCHEDULING = {"unmodified": "", "nice 10": "nice", "batch scheduling": "batch", "one thread": "one"}
"""Variants by their name in the table: see `training.MIRROR_SCHEDULING`."""


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Train every size under each variant, alternating."""
    torch.set_num_threads(1)
    results["pairs"] = []
    steps.expect(args.rounds * len(args.sizes) * (1 + len(SCHEDULING)))
    for size in args.sizes:
        steps.begin(f"{size}, {len(SCHEDULING) + 1} variants alternating")
        with scratch() as place:
            common = JobOptions(size, devices=RANKS, turns=True, root=str(place.files))
            jobs = {DDP: common} | {
                name: common.but(strategy=CKPTLESS, mirror_scheduling=scheduling)
                for name, scheduling in SCHEDULING.items()
            }
            segment = partial(segment_of, steps=40 if size == "tiny" else 8, warm_up=WARM_UP_STEPS)
            with running(jobs, place) as started:
                for job in started.values():
                    job.train(2 * WARM_UP_STEPS)
                results["pairs"].append(results_of(size, 2, alternate(started, args.rounds, segment, steps.done)))


def tables(_: Namespace, results: Results) -> list[Table]:
    variants = [variant for pair in results["pairs"] for variant in variants_of(pair)]
    columns = (*STEP, part("staged after ms", "stage_s"), part("committed after ms", "round_s"))
    title = f"Cost of a mirrored step by scheduling of the mirror thread, {RANKS} CPU ranks, alternating"
    return [Table.of(title, variants, *columns, notes=[STEP_NOTE])]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=["tiny", "10M"], choices=list(WIDTHS), help="model sizes")
    add_count(parser, "--rounds", Default(20, 3), "segments per variant")


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
