"""The cost of mirroring every step while nothing fails, compared with Lightning's `ddp`.

Two ranks of the same job train under each strategy. The jobs run at the same time and alternate in short segments.
Medians of neighbouring segments are compared, so that a slowdown of the machine affects both.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.harness.processes import Scratch, scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count, console
from benchmarks.harness.staging import gb_per_s, measure_staging, ratio_to_memcpy, verdict_on
from benchmarks.harness.table import Column, Table, verdict
from benchmarks.harness.turns import JobLostError, alternate, running, segment_of
from benchmarks.jobs.gpt import WIDTHS, state_bytes
from benchmarks.jobs.job import JobOptions

WARM_UP_STEPS = 4
RANKS = 2
SIZES = ("tiny", "1M", "10M", "33M")
DDP, CKPTLESS, COPIES, SENT = "ddp", "ckptless", "failure_domain=rank", "failure_domain=rank, replicas=send"
OPTIONS: dict[str, dict[str, Any]] = {
    "staging=blocking": {"staging": "blocking"},
    "checksum=crc32": {"checksum": "crc32"},
    "checksum=none": {"checksum": "none"},
    "mirror_every_n_steps=10": {"mirror_every_n_steps": 10},
    COPIES: {"failure_domain": "rank"},
    SENT: {"failure_domain": "rank", "replicas": "send"},
    "history=8": {"history": 8},
}
"""The strategy options that affect its cost, compared for one size."""
FIXED_TARGET_MS = 1.5

Segment = dict[str, Any]
Quantity = Callable[[Segment], float]


# ---------------------------------------------------------------------- measurement


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
        batches: samples per rank and step.
        segment_s: target length of a segment, in seconds.
        steps: minimum and maximum number of measured steps per segment.
        repeats: repeats of staging and of memcpy.
    """

    batches: tuple[int, ...] = (2, 8)
    segment_s: float = 3.0
    steps: tuple[int, int] = (6, 60)
    repeats: int = 40


QUICK = Plan(batches=(2,), segment_s=1.0, steps=(4, 20), repeats=10)


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Measure staging, and train every size and batch under each variant."""
    torch.set_num_threads(1)
    plan = QUICK if args.quick else Plan()
    pairs: list[tuple[str, int, dict[str, dict[str, Any]]]]
    pairs = [(size, batch, {}) for size in args.sizes for batch in plan.batches]
    if args.variants_at and not args.quick:
        pairs.append((args.variants_at, plan.batches[-1], OPTIONS))
    steps.expect(sum(args.rounds * (2 + len(options)) for _, _, options in pairs) + len(args.sizes))
    results |= {"pairs": [], "staging": []}
    with scratch() as place:
        for size in args.sizes:
            steps.begin(f"staging, {size}")
            results["staging"].append(measure_staging(size, place.arenas, ranks=RANKS, repeats=plan.repeats))
            steps.done()
        for size, batch, options in pairs:
            steps.begin(f"{size}, batch {batch}, {2 + len(options)} strategies alternating")
            try:
                results["pairs"].append(train(size, batch, options, plan, args.rounds, place, steps))
            except JobLostError as error:
                # One failed job does not discard an hour of measurements; its row is left out of the table.
                console.print(f"{size}, batch {batch}: {error}", markup=False)


def train(
    size: str, batch: int, options: dict[str, dict[str, Any]], plan: Plan, rounds: int, place: Scratch, steps: Steps
) -> Results:
    """Train a model size with `ddp`, with our strategy, and with its options, alternating."""
    ddp = JobOptions(size, batch, DDP, devices=RANKS, root=str(place.files), turns=True)
    ours = {name: ddp.but(strategy=CKPTLESS, strategy_options=chosen) for name, chosen in options.items()}
    jobs = {DDP: ddp, CKPTLESS: ddp.but(strategy=CKPTLESS), **ours}
    with running(jobs, place) as started:
        first = [note for job in started.values() for note in job.train(WARM_UP_STEPS + 4)]
        step_s = median(step for note in first for step in note.fields["steps_s"][WARM_UP_STEPS:])
        count = WARM_UP_STEPS + max(plan.steps[0], min(plan.steps[1], int(plan.segment_s / step_s)))
        segment = partial(segment_of, steps=count, warm_up=WARM_UP_STEPS)
        return results_of(size, batch, alternate(started, rounds, segment, steps.done))


def results_of(size: str, batch: int, segments: dict[str, list[Segment]]) -> Results:
    return {"size": size, "batch": batch, "segments": segments, "state_bytes": state_bytes(size)}


# ---------------------------------------------------------------------- quantities


def step_ms(segment: Segment) -> float:
    """Return the median step of a segment in ms, on the slower rank."""
    return float(1e3 * max(median(rank["steps_s"]) for rank in segment["ranks"]))


def cpu_ms(segment: Segment) -> float:
    """Return the CPU time of a step in ms: all threads of a rank, mean over steps and ranks."""
    return float(1e3 * segment["cpu_per_step_s"])


@dataclass(frozen=True)
class Variant:
    """The segments of one strategy, and the neighbouring ones of `ddp`."""

    size: str
    batch: int
    name: str
    segments: list[Segment]
    ddp: list[Segment]
    state_mb: float = 0.0
    step: Quantity = step_ms

    def over_ms(self, quantity: Quantity | None = None) -> list[float]:
        """Return the difference of a quantity from the neighbouring segment of `ddp`, per round; nothing for `ddp`."""
        quantity = quantity or self.step
        pairs = zip(self.segments, self.ddp, strict=True)
        return [] if self.name == DDP else [quantity(ours) - quantity(theirs) for ours, theirs in pairs]

    def part_ms(self, name: str) -> list[float]:
        """Return one part of the steps in ms, of all ranks and segments; empty if it was never measured."""
        return [1e3 * v for segment in self.segments for rank in segment["ranks"] for v in rank.get(name, ())]

    def busy_ms(self, kind: str = "") -> float:
        """Return the time in ms that the training thread spends on a step, without waits; CPU time for `cpu_`.

        It captures the host state, packs it, hands it over, and stamps the new step.
        """
        whole = self.median_ms(f"commit_{kind}s") + self.median_ms(f"stamp_{kind}s")
        return whole if kind else whole - self.median_ms("stall_s")

    def median_ms(self, name: str) -> float:
        return median(self.part_ms(name) or [0.0])

    @property
    def shard_mb(self) -> float:
        """Megabytes that a rank stages per step."""
        return float(max(rank.get("staged_bytes", 0) for rank in self.segments[-1]["ranks"]) / 1e6)

    def arena_mb(self, name: str) -> float:
        return float(self.segments[-1]["ranks"][0][name] / 1e6 / RANKS)


def variants_of(pair: Results, step: Quantity = step_ms) -> list[Variant]:
    segments, state_mb = pair["segments"], pair.get("state_bytes", 0) / 1e6
    return [Variant(pair["size"], pair["batch"], n, s, segments[DDP], state_mb, step) for n, s in segments.items()]


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def part(head: str, name: str, form: str = ".2f") -> Column:
    """Return the column of the median of a part of the steps, in ms."""
    return Column(head, lambda variant: variant.part_ms(name), form, median)


# ---------------------------------------------------------------------- tables

NAMES = (Column("model", lambda v: v.size), Column("batch", lambda v: v.batch), Column("strategy", lambda v: v.name))
STEP = (
    *NAMES,
    Column("step ms", lambda v: median(map(v.step, v.segments)), ".2f"),
    Column("over ddp ms", lambda v: v.over_ms(), ".2f", median),
    Column("min to max", lambda v: v.over_ms(), of=spread),
    Column("over ddp", lambda v: median(v.over_ms()) / median(map(v.step, v.ddp)) if v.over_ms() else None, "+.1%"),
    Column("CPU over ddp ms", lambda v: v.over_ms(cpu_ms), ".2f", median),
    Column("cores used by others", lambda v: median(s["cores_used_by_others"] for s in v.segments), ".2f"),
)
STEP_NOTE = (
    "Step: median of a segment on the slower rank, median over segments. Over ddp: median over rounds of the "
    "difference from the neighbouring segment. CPU: of all threads of a rank, including what a free core would hide. "
    "Cores used by others: by other processes on the machine at that time, median."
)
PARTS = (
    *NAMES,
    Column("MB staged", lambda v: v.shard_mb, ".1f"),
    part("commit", "commit_s"),
    part("commit CPU", "commit_cpu_s"),
    part("commit wait", "stall_s"),
    part("stamp", "stamp_s"),
    part("wait for copy", "wait_s"),
    part("mirror CPU", "mirror_cpu_s"),
    part("staged after", "stage_s"),
    part("round", "round_s"),
)
PARTS_NOTE = (
    "Training thread: commit (capture of the host state, hand-over, wait for the previous round), stamp of the new "
    "step, wait for the copy before the optimizer step. "
    "Mirror thread: its CPU time per round, and the time from hand-over until the shard is staged and until the round "
    "is committed on all ranks."
)
SPLIT: dict[str, Callable[[Variant], float]] = {
    "step time over ddp": lambda v: median(v.over_ms()),
    "CPU time over ddp, all threads": lambda v: median(v.over_ms(cpu_ms)),
    "training thread, without waits": lambda v: v.busy_ms(),
    "training thread, CPU": lambda v: v.busy_ms("cpu_"),
    "mirror thread, CPU": lambda v: v.median_ms("mirror_cpu_s"),
    "hand-over until staged": lambda v: v.median_ms("stage_s"),
}
STAGING = (
    Column("model", "size"),
    Column("MB", lambda row: row["shard_bytes"] / 1e6, ".2f"),
    Column("pieces", "pieces"),
    Column("memcpy ms", lambda row: 1e3 * median(row["memcpy_s"]), ".2f"),
    Column("GB/s", lambda row: gb_per_s(row, "memcpy_s"), ".1f"),
    Column("staging ms", lambda row: 1e3 * median(row["stage_s"]), ".2f"),
    Column("GB/s", lambda row: gb_per_s(row, "stage_s"), ".1f"),
    Column("ratio", ratio_to_memcpy, ".2f"),
    Column("over memcpy ms", lambda row: 1e3 * (median(row["stage_s"]) - median(row["memcpy_s"])), ".2f"),
)
MEMORY = (
    *NAMES[::2],
    Column("state MB", lambda v: v.state_mb, ".1f"),
    Column("kept shards", lambda v: int(v.name == COPIES)),
    Column("formula MB", lambda v: 2 * (1 + (v.name == COPIES)) / RANKS * v.state_mb, ".1f"),
    Column("arena per rank MB", lambda v: v.arena_mb("arena_bytes"), ".1f"),
    Column("peak MB", lambda v: v.arena_mb("peak_arena_bytes"), ".1f"),
    Column("arena / state", lambda v: v.arena_mb("arena_bytes") / v.state_mb, ".2f"),
)
MEMORY_NOTE = (
    "The formula counts parameters and optimizer state: 2 (1 + m) / N of it for m kept shards and N ranks. On one node "
    "no shards are kept for other ranks unless failure_domain=rank. Peak: while the slots of the first step, which has "
    "no optimizer state yet, still exist."
)


def tables(_: Namespace, results: Results) -> list[Table]:
    variants = [variant for pair in results["pairs"] for variant in variants_of(pair)]
    mirrored = [variant for variant in variants if variant.name != DDP]
    arenas: dict[tuple[str, str], Variant] = {}
    for variant in mirrored:
        if variant.name in {CKPTLESS, COPIES}:
            # Of several batch sizes the first one is shown.
            arenas.setdefault((variant.size, variant.name), variant)
    ratios = [f"{row['size']}: {verdict_on(row)}" for row in results["staging"] if row["size"] != "tiny"]
    staging = "Staging the shard of one rank of two, against a plain memcpy into warm shared memory"
    memory = "Shared memory per rank, against 2 slots x (own shard + kept shards)"
    return [
        Table.of("Step time on 2 CPU ranks, one thread each, alternating", variants, *STEP, notes=[STEP_NOTE]),
        Table.of("Parts of a mirrored step, medians in ms", mirrored, *PARTS, notes=[PARTS_NOTE]),
        split_table(results),
        Table.of(f"{staging}, alternating in one process", results["staging"], *STAGING, notes=ratios),
        Table.of(memory, arenas.values(), *MEMORY, notes=[MEMORY_NOTE]),
    ]


def split_table(results: Results) -> Table:
    """Return the table of the fixed cost and the cost per byte, by a linear fit over the sizes without options.

    A point is weighted by the inverse of its size, since the spread of a time grows with the size, and small sizes
    determine the fixed part.
    """
    pairs = [variants_of(pair)[1] for pair in results["pairs"] if len(pair["segments"]) == 2]
    megabytes = np.array([variant.shard_mb for variant in pairs])
    table = Table("Fixed part and part per byte, by least squares over the sizes",
                  ("quantity", "fixed ms", "ms per 100 MB of shard"))  # fmt: skip
    if len({variant.size for variant in pairs}) < 2:
        return table
    for name, quantity in SPLIT.items():
        slope, fixed = np.polyfit(megabytes, [quantity(variant) for variant in pairs], 1, w=1 / (1 + megabytes))
        table.rows.append((name, f"{fixed:.2f}", f"{100 * slope:.2f}"))
    least = min(pairs, key=lambda variant: variant.shard_mb)
    smallest = [variant for variant in pairs if variant.size == least.size]
    own, whole = max(v.busy_ms() for v in smallest), max(median(v.over_ms()) for v in smallest)
    table.notes.append(
        f"{least.size} is {least.shard_mb:.2f} MB per rank, so its cost is the fixed part. Training thread, the worse "
        f"of its batch sizes: {verdict(own, FIXED_TARGET_MS, 'ms')}"
    )
    what = "The same including what the mirror thread takes from it"
    table.notes.append(f"{what}: {verdict(whole, FIXED_TARGET_MS, 'ms')}")
    return table


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(WIDTHS), help="model sizes")
    about = "size at which options are compared; empty for none (default: %(default)s)"
    parser.add_argument("--variants-at", default="10M", choices=["", *SIZES], help=about)
    add_count(parser, "--rounds", Default(8, 3), "segments per strategy")


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
