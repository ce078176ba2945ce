"""The cost of mirroring every step while nothing fails, compared with Lightning's `ddp`.

Two ranks of the same job train under each strategy. The jobs run at the same time and alternate in short segments.
Medians of neighbouring segments are compared, so that a slowdown of the machine affects both.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress

from benchmarks import machine
from benchmarks.gpt import GPT, WIDTHS
from benchmarks.job import JobOptions
from benchmarks.quantiles import median
from benchmarks.report import Report, base_parser, console, progress_bar
from benchmarks.scratch import Scratch, scratch
from benchmarks.stage import measure_staging
from benchmarks.steady_tables import cost_table, memory_table, split_table, staging_table, step_table
from benchmarks.threads import JobLostError, TurnsJob, fork_server

WARM_UP_STEPS = 4
RANKS = 2
SIZES = ("tiny", "1M", "10M", "33M")


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
        batches: samples per rank and step.
        rounds: segments per variant.
        segment_s: target length of a segment, in seconds.
        steps: minimum and maximum number of measured steps per segment.
        repeats: repeats of staging and of memcpy.
    """

    batches: tuple[int, ...] = (2, 8)
    rounds: int = 8
    segment_s: float = 3.0
    steps: tuple[int, int] = (6, 60)
    repeats: int = 40


@dataclass(frozen=True)
class Variant:
    """A training setup.

    Args:
        name: name in the table.
        strategy: `ckptless` or `ddp`.
        options: options of the strategy.
    """

    name: str
    strategy: str = "ckptless"
    options: dict[str, Any] = field(default_factory=dict)


DDP = Variant("ddp", "ddp")
CKPTLESS = Variant("ckptless")
VARIANTS = (
    DDP,
    CKPTLESS,
    Variant("staging=blocking", options={"staging": "blocking"}),
    Variant("checksum=crc32", options={"checksum": "crc32"}),
    Variant("checksum=none", options={"checksum": "none"}),
    Variant("mirror_every_n_steps=10", options={"mirror_every_n_steps": 10}),
    Variant("failure_domain=rank", options={"failure_domain": "rank"}),
)
"""Variants that are compared for one size: the strategy options that affect its cost."""


def measure(size: str, batch: int, variants: tuple[Variant, ...], plan: Plan, place: Scratch, advance: Any) -> Any:
    """Train a model size under each variant, alternating.

    Returns:
        By variant, the reports of the ranks on each segment.
    """
    segments: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    with fork_server(machine.ROOT) as parent, ExitStack() as stack:
        jobs = {}
        for variant in variants:
            options = JobOptions(
                size, batch, variant.strategy, variant.options, RANKS, turns=True, root=str(place.files)
            )
            jobs[variant.name] = stack.enter_context(TurnsJob(options, parent, place))
        first = [jobs[v.name].train(WARM_UP_STEPS + 4) for v in variants]
        step_s = median([step for notes in first for note in notes for step in note.fields["steps_s"][WARM_UP_STEPS:]])
        steps = WARM_UP_STEPS + max(plan.steps[0], min(plan.steps[1], int(plan.segment_s / step_s)))
        for _ in range(plan.rounds):
            for variant in variants:
                segments[variant.name].append(segment_of(jobs[variant.name], steps))
                advance()
    return {"size": size, "batch": batch, "segments": segments, "state_bytes": state_bytes(size)}


def segment_of(job: TurnsJob, steps: int) -> dict[str, Any]:
    """Let a job train; return the reports on the steps after the warm-up, and the load caused by other processes."""
    before = machine.Busy.now()
    notes = job.train(steps)
    own_cpu_s = sum(note.fields.pop("cpu_s") for note in notes)
    per_step_s = own_cpu_s / steps / len(notes)
    others = machine.Busy.now().cores_used_by_others(before, own_cpu_s)
    ranks = [
        {name: value[WARM_UP_STEPS:] if isinstance(value, list) else value for name, value in note.fields.items()}
        for note in notes
    ]
    return {"ranks": ranks, "cpu_per_step_s": per_step_s, "cores_used_by_others": others}


def state_bytes(size: str) -> int:
    """Return the bytes of a model's parameters and of AdamW's two moments."""
    with torch.device("meta"):
        return 3 * 4 * GPT(size).parameter_count()


def run(plan: Plan, sizes: list[str], variants_at: str, progress: Progress) -> dict[str, Any]:
    """Measure everything."""
    pairs: list[tuple[str, int, tuple[Variant, ...]]] = [
        (size, batch, (DDP, CKPTLESS)) for size in sizes for batch in plan.batches
    ]
    if variants_at:
        pairs.append((variants_at, plan.batches[-1], VARIANTS))
    total = sum(plan.rounds * len(variants) for _, _, variants in pairs)
    task = progress.add_task("", total=total + len(sizes))
    results: dict[str, Any] = {"pairs": [], "staging": []}
    with scratch() as place:
        for size in sizes:
            progress.update(task, description=f"staging, {size}")
            results["staging"].append(measure_staging(size, place.arenas, ranks=RANKS, repeats=plan.repeats))
            progress.advance(task)
        for size, batch, variants in pairs:
            progress.update(task, description=f"{size}, batch {batch}, {len(variants)} strategies alternating")
            try:
                results["pairs"].append(measure(size, batch, variants, plan, place, lambda: progress.advance(task)))
            except JobLostError as error:
                # One failed job does not discard an hour of measurements; its row is left out of the table.
                console.print(f"{size}, batch {batch}: {error}", markup=False)
    return results


def main() -> None:
    """Read the command line, measure, report."""
    parser = base_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(WIDTHS), help="model sizes")
    parser.add_argument("--variants-at", default="10M", choices=["", *SIZES], help="size at which options are compared")
    parser.add_argument("--rounds", type=int, help="segments per strategy")
    args = parser.parse_args()
    report = Report(args)
    torch.set_num_threads(1)
    with progress_bar() as progress:
        results = run(_plan(args), args.sizes, "" if args.quick else args.variants_at, progress)
    tables = [
        step_table(results),
        cost_table(results),
        split_table(results),
        staging_table(results),
        memory_table(results, RANKS),
    ]
    report.finish(tables, results)


def _plan(args: argparse.Namespace) -> Plan:
    quick = Plan(batches=(2,), rounds=3, segment_s=1.0, steps=(4, 20), repeats=10)
    plan = quick if args.quick else Plan()
    return plan if args.rounds is None else Plan(plan.batches, args.rounds, plan.segment_s, plan.steps, plan.repeats)


if __name__ == "__main__":
    main()
