"""The cost of mirroring every step while nothing fails, compared with Lightning's `ddp`.

Two ranks of the same job train under each strategy. The jobs run at the same time and alternate in short segments.
Medians of neighbouring segments are compared, so that a slowdown of the machine affects both. With `--fsdp2` the model
is sharded. A device computes asynchronously, so its step is the mean of a segment until all work is done. With
`--profile`, a third job counts the calls of each file of the package; its times are shares rather than costs. With one
size and batch, a table says where the CPU time goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.harness.benchmark import Benchmark, Results, Steps, console, option
from benchmarks.harness.processes import scratch
from benchmarks.harness.table import Column, Table, verdict
from benchmarks.harness.turns import NAMES, Plan, Segment, Variant, cpu_ms, step_ms, train_in_turns
from benchmarks.harness.watch import NoRecoveryError
from benchmarks.jobs.cpu_account import PARTS as CPU_PARTS
from benchmarks.jobs.gpt import WIDTHS
from benchmarks.jobs.job import JobOptions

DDP, CKPTLESS, PROFILED = "ddp", "ckptless", "profiled"
OPTIONS: dict[str, dict[str, Any]] = {
    "staging=blocking": {"staging": "blocking"},
    "staging=device": {"staging": "device"},
    "checksum=crc32": {"checksum": "crc32"},
    "checksum=none": {"checksum": "none"},
    "mirror_every_n_steps=10": {"mirror_every_n_steps": 10},
    "failure_domain=rank": {"failure_domain": "rank"},
    "failure_domain=rank, replicas=send": {"failure_domain": "rank", "replicas": "send"},
    "history=8": {"history": 8},
}
"""The strategy options that affect its cost, compared for one size."""
FIXED_TARGET_MS = 1.5
LEAST_SHARE = 0.01
"""Files below this share of a profile are left out."""


def mean_ms(segment: Segment) -> float:
    """Return the mean step of a segment in ms, until all work on the device is done."""
    return float(1e3 * segment["ranks"][0]["mean_s"])


def measured(pair: Results, step: Callable[[Segment], float] = step_ms) -> list[Variant]:
    """Return the variants of a size and batch, each compared with `ddp`."""
    segments = pair["segments"]
    return [Variant(pair["size"], pair["batch"], name, of, segments[DDP], step) for name, of in segments.items()]


def training_ms(variant: Variant) -> float:
    """Return the time in ms that the training thread spends on a step, without waits.

    It captures the host state, packs it, hands it over, and stamps the new step.
    """
    return variant.median_ms("commit_s") + variant.median_ms("stamp_s") - variant.median_ms("stall_s")


def training_cpu_ms(variant: Variant) -> float:
    return variant.median_ms("commit_cpu_s") + variant.median_ms("stamp_cpu_s")


def part(head: str, name: str) -> Column:
    """Return the column of the median of a part of the steps, in ms."""
    return Column(head, lambda variant: variant.part_ms(name), ".2f", median)


def cpu_table(variant: Variant) -> Table:
    """Return the table of where the CPU time of a step goes, compared with `ddp`."""
    total_ms = median(variant.over(cpu_ms))
    table = Table(
        f"CPU time of a step, {variant.size}, batch {variant.batch}", ("part", "ddp ms", "ms", "over ddp ms", "share")
    )
    for part in (*CPU_PARTS, ""):
        of_part = partial(cpu_of_part_ms, part) if part else cpu_ms
        base_ms, ours_ms = (median(map(of_part, segments)) for segments in (variant.base, variant.segments))
        over_ms = median(variant.over(of_part))
        cells = (f"{value:.2f}" for value in (base_ms, ours_ms, over_ms))
        table.rows.append((part or "all", *cells, f"{over_ms / total_ms:.0%}"))
    table.notes.append(CPU_NOTE)
    return table


def cpu_of_part_ms(part: str, segment: Segment) -> float:
    """Return the CPU time of a part of a step in ms."""
    return float(1e3 * segment["cpu_s"].get(part, 0.0))


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


STEP = (
    *NAMES,
    Column("step ms", lambda v: median(map(v.step, v.segments)), ".2f"),
    Column("over ddp ms", lambda v: v.over(), ".2f", median),
    Column("min to max", lambda v: v.over(), of=spread),
    Column("over ddp", lambda v: median(v.over()) / median(map(v.step, v.base)) if v.over() else None, "+.1%"),
    Column("CPU over ddp ms", lambda v: v.over(cpu_ms), ".2f", median),
)
STEP_NOTE = (
    "Step: median of a segment on the slower rank, median over segments. Over ddp: median over rounds of the "
    "difference from the neighbouring segment. CPU: of all threads of a rank, including what a free core would hide."
)
PARTS = (
    *NAMES,
    Column("MB staged", lambda v: v.most("staged_bytes") / 1e6, ".1f"),
    Column("MB sent", lambda v: v.most("sent_bytes") / 1e6, ".2f"),
    Column("MB of arenas", lambda v: v.most("arena_bytes") / 1e6, ".1f"),
    Column("training thread", training_ms, ".2f"),
    Column("its CPU", training_cpu_ms, ".2f"),
    part("commit", "commit_s"),
    part("commit wait", "stall_s"),
    part("stamp", "stamp_s"),
    part("wait for copy", "wait_s"),
    part("mirror CPU", "mirror_cpu_s"),
    part("staged after", "stage_s"),
    part("round", "round_s"),
)
PARTS_NOTE = (
    "Training thread: commit (capture of the host state, hand-over, wait for the previous round) and stamp of the new "
    "step, without that wait; it also waits for the copy before the optimizer step. "
    "Mirror thread: its CPU time per round, and the time from hand-over until the shard is staged and until the round "
    "is committed on all ranks. Arenas: shared memory of all ranks."
)
CPU_NOTE = (
    "Mean over the steps and ranks of a segment, median over segments; over ddp: median over rounds of the difference "
    "from the neighbouring segment. The first parts are sections of the training thread: between steps, versions are "
    "captured and batches fetched; forward contains the stamp, optimizer step the wait for the copy."
)
SPLIT: dict[str, Callable[[Variant], float]] = {
    "step time over ddp": lambda v: median(v.over()),
    "CPU time over ddp, all threads": lambda v: median(v.over(cpu_ms)),
    "training thread, without waits": training_ms,
    "training thread, CPU": training_cpu_ms,
    "mirror thread, CPU": lambda v: v.median_ms("mirror_cpu_s"),
    "hand-over until staged": lambda v: v.median_ms("stage_s"),
}


def split_table(variants: list[Variant]) -> Table:
    """Return the table of the fixed cost and the cost per byte, by a linear fit over the sizes.

    A point is weighted by the inverse of its size, since the spread of a time grows with the size, and small sizes
    determine the fixed part.
    """
    megabytes = np.array([variant.most("staged_bytes") / 1e6 for variant in variants])
    table = Table("Fixed part and part per byte, by least squares over the sizes",
                  ("quantity", "fixed ms", "ms per 100 MB of shard"))  # fmt: skip
    for name, quantity in SPLIT.items():
        slope, fixed = np.polyfit(megabytes, [quantity(variant) for variant in variants], 1, w=1 / (1 + megabytes))
        table.rows.append((name, f"{fixed:.2f}", f"{100 * slope:.2f}"))
    size, least_mb = variants[int(megabytes.argmin())].size, float(megabytes.min())
    smallest = [variant for variant in variants if variant.size == size]
    own, whole = max(map(training_ms, smallest)), max(median(variant.over()) for variant in smallest)
    table.notes.append(
        f"{size} is {least_mb:.2f} MB per rank, so its cost is the fixed part. Training thread, the worse of its batch "
        f"sizes: {verdict(own, FIXED_TARGET_MS, 'ms')}"
    )
    what = "The same including what the mirror thread takes from it"
    table.notes.append(f"{what}: {verdict(whole, FIXED_TARGET_MS, 'ms')}")
    return table


def profile_of(thread: str, segments: list[Segment]) -> Table:
    """Return the profile of one thread on rank 0, with the files that take most of the time first."""
    ranks = [segment["ranks"][0] for segment in segments]
    versions, files = sum(rank["versions"] for rank in ranks), dict[str, list[float]]()
    for rank in ranks:
        for name, counts in rank["profiles"][thread].items():
            files[name] = [a + b for a, b in zip(files.get(name, [0, 0, 0.0]), counts, strict=True)]
    total = [sum(column) for column in zip(*files.values(), strict=True)]
    rows = sorted(files.items(), key=lambda file: -file[1][2])
    return Table.of(
        f"Profile of the {thread}, rank 0, per version",
        [("all", total), *(row for row in rows if row[1][2] >= LEAST_SHARE * total[2])],
        Column("file", 0),
        Column("functions called", lambda row: row[1][0] / versions, ".1f"),
        Column("built-in functions called", lambda row: row[1][1] / versions, ".1f"),
        Column("us, profiled", lambda row: 1e6 * row[1][2] / versions, ".0f"),
        Column("share", lambda row: row[1][2] / total[2], ".0%"),
    )


@dataclass
class SteadyState(Benchmark):
    sizes: tuple[str, ...] = option(("tiny", "1M", "10M", "33M"), "model sizes", choices=tuple(WIDTHS))
    batches: tuple[int, ...] = option((2, 8), "samples per rank and step", quick=(2,))
    variants_at: str = option("10M", "size at which options are compared; empty for none", quick="")
    rounds: int = option(8, "segments per strategy", quick=3)
    ranks: int = option(2, "number of ranks")
    fsdp2: bool = option(False, "shard the model over the ranks")
    profile: bool = option(False, "profile our strategy in another job")
    accelerator: str = option("cpu", "where to train", choices=("cpu", "gpu"))

    def variants(self, size: str, batch: int, options: dict[str, dict[str, Any]]) -> dict[str, JobOptions]:
        """Return the jobs that are compared: Lightning's strategy, ours, and ours with each of the options."""
        ddp = JobOptions(size, batch, DDP, devices=self.ranks, accelerator=self.accelerator, sharded=self.fsdp2)
        ours = {name: ddp.but(strategy=CKPTLESS, strategy_options=chosen) for name, chosen in options.items()}
        profiled = {PROFILED: ddp.but(strategy=CKPTLESS, profiled=True)} if self.profile and not options else {}
        return {DDP: ddp, CKPTLESS: ddp.but(strategy=CKPTLESS), **profiled, **ours}

    def measure(self, results: Results, steps: Steps) -> None:
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise SystemExit("needs a CUDA device: torch finds none here")
        plan = Plan(self.rounds, (4, 20), 1.0) if self.quick else Plan(self.rounds, (6, 60), 3.0)
        pairs = [(size, batch, dict[str, Any]()) for size in self.sizes for batch in self.batches]
        if self.variants_at:
            pairs.append((self.variants_at, self.batches[-1], OPTIONS))
        steps.expect(sum(self.rounds * len(self.variants(*pair)) for pair in pairs))
        results["pairs"] = []
        for size, batch, options in pairs:
            steps.begin(f"{size}, batch {batch}, alternating")
            try:
                with scratch() as place:
                    segments = train_in_turns(self.variants(size, batch, options), place, plan, steps.done)
            except NoRecoveryError as error:
                # One failed job does not discard an hour of measurements; its row is left out of the table.
                console.print(f"{size}, batch {batch}: {error}", markup=False)
            else:
                results["pairs"].append({"size": size, "batch": batch, "segments": segments})

    def tables(self, results: Results) -> list[Table]:
        step = mean_ms if self.accelerator == "gpu" else step_ms
        variants = [variant for pair in results["pairs"] for variant in measured(pair, step)]
        mirrored = [variant for variant in variants if variant.name not in (DDP, PROFILED)]
        plain = [measured(pair, step)[1] for pair in results["pairs"] if pair["segments"].keys().isdisjoint(OPTIONS)]
        profiled = [pair["segments"][PROFILED] for pair in results["pairs"] if PROFILED in pair["segments"]]
        kind = ", FSDP2" if self.fsdp2 else ""
        title = f"Step time on {self.ranks} {self.accelerator.upper()} ranks{kind}, one thread each, alternating"
        return [
            Table.of(title, variants, *STEP, notes=[STEP_NOTE]),
            Table.of("Parts of a mirrored step, medians in ms", mirrored, *PARTS, notes=[PARTS_NOTE]),
            *([split_table(plain)] if len({variant.size for variant in plain}) > 1 else []),
            *([cpu_table(plain[0])] if len(plain) == 1 and self.accelerator == "cpu" else []),
            *(profile_of(thread, found) for found in profiled for thread in found[0]["ranks"][0]["profiles"]),
        ]


if __name__ == "__main__":
    SteadyState.main()
