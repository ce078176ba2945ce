"""The cost of mirroring every step while nothing fails, compared with Lightning's `ddp`.

Two ranks of the same job train under each strategy. The jobs run at the same time and alternate in short segments.
Medians of neighbouring segments are compared, so that a slowdown of the machine affects both. With `--fsdp2` the model
is sharded. A device computes asynchronously, so its step is the mean of a segment until all work is done.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.harness.processes import scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count, console
from benchmarks.harness.table import Column, Table, verdict
from benchmarks.harness.turns import Plan, train_in_turns
from benchmarks.harness.variants import Quantity, Variant, cpu_ms, mean_ms, part, step_ms
from benchmarks.harness.watch import NoRecoveryError
from benchmarks.jobs.gpt import WIDTHS
from benchmarks.jobs.job import JobOptions

SIZES = ("tiny", "1M", "10M", "33M")
BATCHES = (2, 8)
DDP, CKPTLESS = "ddp", "ckptless"
OPTIONS: dict[str, dict[str, Any]] = {
    "staging=blocking": {"staging": "blocking"},
    "checksum=crc32": {"checksum": "crc32"},
    "checksum=none": {"checksum": "none"},
    "mirror_every_n_steps=10": {"mirror_every_n_steps": 10},
    "failure_domain=rank": {"failure_domain": "rank"},
    "failure_domain=rank, replicas=send": {"failure_domain": "rank", "replicas": "send"},
    "history=8": {"history": 8},
}
"""The strategy options that affect its cost, compared for one size."""
FIXED_TARGET_MS = 1.5


# ---------------------------------------------------------------------- measurement


def variants_of(args: Namespace, size: str, batch: int, options: dict[str, dict[str, Any]]) -> dict[str, JobOptions]:
    """Return the jobs that are compared: Lightning's strategy, ours, and ours with each of the options."""
    ddp = JobOptions(size, batch, DDP, devices=args.ranks, accelerator=args.accelerator, sharded=args.fsdp2)
    ours = {name: ddp.but(strategy=CKPTLESS, strategy_options=chosen) for name, chosen in options.items()}
    return {DDP: ddp, CKPTLESS: ddp.but(strategy=CKPTLESS), **ours}


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Train every size and batch under each variant."""
    if args.accelerator == "gpu" and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device: torch finds none here")
    plan = Plan(args.rounds, (4, 20), 1.0) if args.quick else Plan(args.rounds, (6, 60), 3.0)
    batches = args.batches[:1] if args.quick else args.batches
    pairs: list[tuple[str, int, dict[str, dict[str, Any]]]] = [(s, batch, {}) for s in args.sizes for batch in batches]
    if args.variants_at and not args.quick:
        pairs.append((args.variants_at, batches[-1], OPTIONS))
    steps.expect(sum(args.rounds * (2 + len(options)) for _, _, options in pairs))
    results["pairs"] = []
    with scratch() as place:
        for size, batch, options in pairs:
            steps.begin(f"{size}, batch {batch}, {2 + len(options)} strategies alternating")
            try:
                segments = train_in_turns(variants_of(args, size, batch, options), place, plan, steps.done)
            except NoRecoveryError as error:
                # One failed job does not discard an hour of measurements; its row is left out of the table.
                console.print(f"{size}, batch {batch}: {error}", markup=False)
            else:
                results["pairs"].append({"size": size, "batch": batch, "segments": segments})


# ---------------------------------------------------------------------- tables


def measured(pair: Results, step: Quantity = step_ms) -> list[Variant]:
    """Return the variants of a size and batch, each compared with `ddp`."""
    segments = pair["segments"]
    return [Variant(pair["size"], pair["batch"], name, of, segments[DDP], step) for name, of in segments.items()]


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def busy_ms(variant: Variant, kind: str = "") -> float:
    """Return the time in ms that the training thread spends on a step, without waits; CPU time for `cpu_`.

    It captures the host state, packs it, hands it over, and stamps the new step.
    """
    whole = variant.median_ms(f"commit_{kind}s") + variant.median_ms(f"stamp_{kind}s")
    return whole if kind else whole - variant.median_ms("stall_s")


NAMES = (Column("model", lambda v: v.size), Column("batch", lambda v: v.batch), Column("strategy", lambda v: v.name))
STEP = (
    *NAMES,
    Column("step ms", lambda v: median(map(v.step, v.segments)), ".2f"),
    Column("over ddp ms", lambda v: v.over_ms(), ".2f", median),
    Column("min to max", lambda v: v.over_ms(), of=spread),
    Column("over ddp", lambda v: median(v.over_ms()) / median(map(v.step, v.base)) if v.over_ms() else None, "+.1%"),
    Column("CPU over ddp ms", lambda v: v.over_ms(cpu_ms), ".2f", median),
)
STEP_NOTE = (
    "Step: median of a segment on the slower rank, median over segments. Over ddp: median over rounds of the "
    "difference from the neighbouring segment. CPU: of all threads of a rank, including what a free core would hide."
)
PARTS = (
    *NAMES,
    Column("MB staged", lambda v: v.shard_mb, ".1f"),
    Column("MB sent", lambda v: max(rank.get("sent_bytes", 0) for rank in v.segments[-1]["ranks"]) / 1e6, ".2f"),
    Column("MB of arenas", lambda v: v.segments[-1]["ranks"][0].get("arena_bytes", 0) / 1e6, ".1f"),
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
    "is committed on all ranks. Arenas: shared memory of all ranks."
)
SPLIT: dict[str, Callable[[Variant], float]] = {
    "step time over ddp": lambda v: median(v.over_ms()),
    "CPU time over ddp, all threads": lambda v: median(v.over_ms(cpu_ms)),
    "training thread, without waits": busy_ms,
    "training thread, CPU": lambda v: busy_ms(v, "cpu_"),
    "mirror thread, CPU": lambda v: v.median_ms("mirror_cpu_s"),
    "hand-over until staged": lambda v: v.median_ms("stage_s"),
}


def tables(args: Namespace, results: Results) -> list[Table]:
    step = mean_ms if args.accelerator == "gpu" else step_ms
    variants = [variant for pair in results["pairs"] for variant in measured(pair, step)]
    mirrored = [variant for variant in variants if not variant.is_base]
    kind = ", FSDP2" if args.fsdp2 else ""
    title = f"Step time on {args.ranks} {args.accelerator.upper()} ranks{kind}, one thread each, alternating"
    return [
        Table.of(title, variants, *STEP, notes=[STEP_NOTE]),
        Table.of("Parts of a mirrored step, medians in ms", mirrored, *PARTS, notes=[PARTS_NOTE]),
        split_table(results),
    ]


def split_table(results: Results) -> Table:
    """Return the table of the fixed cost and the cost per byte, by a linear fit over the sizes without options.

    A point is weighted by the inverse of its size, since the spread of a time grows with the size, and small sizes
    determine the fixed part.
    """
    pairs = [measured(pair)[1] for pair in results["pairs"] if len(pair["segments"]) == 2]
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
    own, whole = max(map(busy_ms, smallest)), max(median(variant.over_ms()) for variant in smallest)
    table.notes.append(
        f"{least.size} is {least.shard_mb:.2f} MB per rank, so its cost is the fixed part. Training thread, the worse "
        f"of its batch sizes: {verdict(own, FIXED_TARGET_MS, 'ms')}"
    )
    what = "The same including what the mirror thread takes from it"
    table.notes.append(f"{what}: {verdict(whole, FIXED_TARGET_MS, 'ms')}")
    return table


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(WIDTHS), help="model sizes")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="samples per rank and step")
    about = "size at which options are compared; empty for none (default: %(default)s)"
    parser.add_argument("--variants-at", default="10M", choices=["", *SIZES], help=about)
    add_count(parser, "--rounds", Default(8, 3), "segments per strategy")
    add_count(parser, "--ranks", 2, "number of ranks")
    parser.add_argument("--fsdp2", action="store_true", help="shard the model over the ranks")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"], help="where to train (default: cpu)")


PROGRAM = Program(__doc__, measure, tables, options)

if __name__ == "__main__":
    PROGRAM.main()
