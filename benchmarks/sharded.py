"""Mirroring at size: models of 33, 100 and 300 million parameters on two and four CPU ranks, DDP and FSDP2.

Each job takes a version at every fourth step. The step at whose end it is taken and the step during which it is copied
are compared with the two in between, in the same job and seconds apart, so that no second job has to fit into memory.
Torch's `async_save` of the same state is measured in a separate job. Takes half an hour; five minutes with `--sizes
33M`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch

from benchmarks.harness.processes import Scratch, scratch
from benchmarks.harness.report import Program, Results, Steps, add_count, console
from benchmarks.harness.staging import gb_per_s, measure_frozen, measure_staging, ratio_to_memcpy, verdict_on
from benchmarks.harness.table import Column, Table
from benchmarks.harness.turns import JobLostError, running
from benchmarks.jobs.async_save import saves_of
from benchmarks.jobs.gpt import LAYERS, WIDTHS, parameter_count
from benchmarks.jobs.job import JobOptions

EVERY = 4
"""Steps between two versions: a version is taken at the end of the last step and copied during the first."""
SIZES = ("33M", "100M", "300M")
RANKS = (2, 4)
BATCH = 1
SHARE_OF_MEMORY = 0.85
"""Share of free memory to use: torch and the kernel need some, too."""
FLOAT_BYTES = 4
STATE_FLOATS = 3
"""Floats per parameter in the state: itself, and AdamW's two moments."""


# ---------------------------------------------------------------------- what fits into memory


@dataclass(frozen=True)
class Cell:
    """A model on a number of ranks, with FSDP2 or with DDP."""

    size: str
    parameters: int
    ranks: int
    is_sharded: bool

    @property
    def strategy(self) -> str:
        return "FSDP2" if self.is_sharded else "DDP"

    @property
    def state_bytes(self) -> int:
        return STATE_FLOATS * FLOAT_BYTES * self.parameters

    def training_bytes(self) -> int:
        """Return the bytes that training takes without mirroring: state, gradients, and buffers of DDP or FSDP2."""
        whole = FLOAT_BYTES * self.parameters
        if self.is_sharded:
            # In addition to the shards, each rank has the gathered weights and gradients of two blocks.
            return (STATE_FLOATS + 1) * whole + self.ranks * 4 * whole // LAYERS
        return self.ranks * (STATE_FLOATS + 2) * whole

    def arena_bytes(self, kept: int) -> int:
        """Return the peak bytes of all arenas: two slots per copy, plus those of the first step."""
        return 2 * (1 + kept) * self.state_bytes * 4 // 3

    def __str__(self) -> str:
        return f"{self.size}, {self.strategy}, {self.ranks} ranks"


def cells(sizes: list[str], ranks: list[int]) -> list[Cell]:
    """Return all requested cells."""
    counts = {size: parameter_count(size) for size in sizes}
    return [Cell(size, counts[size], count, kind) for size in sizes for count in ranks for kind in (False, True)]


def kept_shards(cell: Cell, free_bytes: int) -> tuple[int | None, str]:
    """Return the number of shards that a rank keeps for others, one or zero, and the calculation in words.

    It is None if the cell does not fit into free memory at all.
    """
    needed = [cell.training_bytes() + cell.arena_bytes(kept) for kept in (0, 1)]
    kept = int(needed[1] <= free_bytes)
    reason = (
        f"{cell}: {cell.training_bytes() / 1e9:.1f} GB of training and {cell.arena_bytes(kept) / 1e9:.1f} GB of arenas "
        f"with {kept} kept shards, {free_bytes / 1e9:.1f} GB free"
    )
    return kept if needed[kept] <= free_bytes else None, reason


# ---------------------------------------------------------------------- measurement


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Measure staging of every size, and train every cell that fits; results are stored as they arrive."""
    torch.set_num_threads(1)
    results |= {"cells": [], "staging": [], "frozen": [], "left_out": []}
    wanted, repeats = cells(args.sizes, args.ranks), 3 if args.quick else 10
    steps.expect(len(wanted) + len(args.sizes))
    for size in args.sizes:
        steps.begin(f"staging, {size}")
        with scratch() as place:
            for ranks in args.ranks:
                staged = measure_staging(size, place.arenas, ranks=ranks, repeats=repeats)
                results["staging"].append({"ranks": ranks, **staged})
            results["frozen"].append(measure_frozen(size, place.arenas, ranks=2, repeats=repeats))
        steps.done()
    for cell in wanted:
        steps.begin(str(cell))
        kept, reason = kept_shards(cell, int(SHARE_OF_MEMORY * psutil.virtual_memory().available))
        try:
            if kept is None:
                results["left_out"].append(reason)
            else:
                results["cells"].append(train(cell, kept, args.cycles))
        except JobLostError as error:
            console.print(f"{cell}: {error}", markup=False)
            results["left_out"].append(f"{cell}: the job was lost")
        steps.done()


def train(cell: Cell, kept: int, cycles: int) -> Results:
    """Train a cell with mirroring, then with `async_save`."""
    chosen = {"mirror_every_n_steps": EVERY, "failure_domain": "rank" if kept else "node"}
    with scratch() as place:
        common = JobOptions(
            cell.size, BATCH, devices=cell.ranks, turns=True, root=str(place.files), sharded=cell.is_sharded
        )
        ours = common.but(strategy="ckptless", strategy_options=chosen)
        mirrored, reports, _ = _train(ours, cycles, place)
        plain, _, saves = _train(common.but(async_save_every=EVERY), cycles, place)
    facts = {**vars(cell), "strategy": cell.strategy, "state_bytes": cell.state_bytes, "kept": kept}
    return {**facts, "steps_s": mirrored, "rank_reports": reports, "async_steps_s": plain, "saves": saves}


def _train(
    options: JobOptions, cycles: int, place: Scratch
) -> tuple[list[float], list[dict[str, Any]], list[dict[str, float]]]:
    """Return the step times on the slowest rank, the reports of the ranks, and the records of `async_save`."""
    with running({"": options}, place) as jobs:
        job = jobs[""]
        job.train(EVERY)
        notes = job.train(EVERY * cycles)
    steps_s = [max(step) for step in zip(*(note.fields["steps_s"] for note in notes), strict=True)]
    return steps_s, [note.fields for note in notes], saves_of(job.folder)


# ---------------------------------------------------------------------- tables


def version_costs_ms(cell: Results) -> list[float]:
    """Return the cost of each version in ms: the two steps that it affects, minus the two in between.

    The steps are whole cycles of four: a version is taken at the end of the last, and copied during the first.
    """
    steps = cell["steps_s"]
    cycles = [steps[at : at + EVERY] for at in range(0, len(steps), EVERY)]
    return [1e3 * (first + last - second - third) for first, second, third, last in cycles]


def plain_step_ms(cell: Results) -> float:
    """Return the median of the steps that no version affects."""
    return float(1e3 * median(step for at, step in enumerate(cell["steps_s"]) if at % EVERY in (1, 2)))


def part_ms(name: str) -> Callable[[Results], list[float]]:
    return lambda cell: [1e3 * value for rank in cell["rank_reports"] for value in rank.get(name, ())]


def save_ms(name: str) -> Callable[[Results], list[float]]:
    return lambda cell: [1e3 * save[name] for save in cell["saves"]]


def spread(values: list[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}"


def formula_mb(cell: Results) -> float:
    return float(2 * (1 + cell["kept"]) / cell["ranks"] * cell["state_bytes"] / 1e6)


def arena_mb(cell: Results) -> float:
    return float(cell["rank_reports"][0]["arena_bytes"] / cell["ranks"] / 1e6)


CELL = (Column("model", "size"), Column("strategy", "strategy"), Column("ranks", "ranks"))
BYTES = (
    *CELL,
    Column("state MB", lambda cell: cell["state_bytes"] / 1e6, ".0f"),
    Column("kept", "kept"),
    Column("formula MB", formula_mb, ".0f"),
    Column("arena per rank MB", arena_mb, ".0f"),
    Column("over the formula", lambda cell: arena_mb(cell) / formula_mb(cell) - 1, "+.2%"),
    Column("sent MB", lambda cell: max(rank["sent_bytes"] for rank in cell["rank_reports"]) / 1e6, ".0f"),
)
BYTES_NOTE = (
    "Formula: 2 (1 + m) / N of parameters and optimizer state, for m kept shards and N ranks. Sent: by the rank that "
    "sends the most, per version."
)
VERSION = (
    *CELL,
    Column("plain step ms", plain_step_ms, ".0f"),
    Column("a version costs ms", version_costs_ms, ".0f", median),
    Column("min to max", version_costs_ms, of=spread),
    Column("share of a step", lambda cell: median(version_costs_ms(cell)) / plain_step_ms(cell), "+.1%"),
    Column("staged ms", part_ms("stage_s"), ".0f", median),
    Column("committed ms", part_ms("round_s"), ".0f", median),
    Column("async_save: waits ms", save_ms("blocked_s"), ".0f", median),
    Column("on disk after ms", save_ms("total_s"), ".0f", median),
)
VERSION_NOTE = (
    "A version costs: the step at whose end it is taken plus the step during which it is copied, minus two other steps "
    "of the same cycle; slowest rank, median over versions. Staged, committed: time after the hand-over. "
    "async_save: time that the training thread waits in it, for the previous save and for the copy of the state."
)
STAGING = (
    Column("model", "size"),
    Column("ranks", "ranks"),
    Column("MB", lambda row: row["shard_bytes"] / 1e6, ".0f"),
    Column("pieces", "pieces"),
    Column("memcpy GB/s", lambda row: gb_per_s(row, "memcpy_s"), ".1f"),
    Column("staging GB/s", lambda row: gb_per_s(row, "stage_s"), ".1f"),
    Column("share of memcpy speed", lambda row: 1 / ratio_to_memcpy(row), ".0%"),
)
FROZEN = (
    Column("model", "size"),
    Column("MB", lambda row: row["shard_bytes"] / 1e6, ".1f"),
    Column("static MB", lambda row: row["static_bytes"] / 1e6, ".1f"),
    Column("written MB", lambda row: row["written_bytes"] / 1e6, ".1f"),
    Column("sent to a holder MB", lambda row: row["sent_bytes"] / 1e6, ".1f"),
    Column("stage and checksum ms", lambda row: 1e3 * median(row["static_s"]), ".1f"),
    Column("without ms", lambda row: 1e3 * median(row["plain_s"]), ".1f"),
    Column("ratio", lambda row: median(row["static_s"]) / median(row["plain_s"]), ".0%"),
)
STAGING_TITLE = "Staging the shard of one rank, against a plain memcpy into warm shared memory"
FROZEN_TITLE = "Nine tenths of the parameters frozen: a version of the shard of one rank of two"
FROZEN_NOTE = "Without: the same tensors in a layout that treats none of them as static."


def tables(_: Namespace, results: Results) -> list[Table]:
    found, staged, alternating = results["cells"], results["staging"], "alternating in one process"
    left_out = [f"Left out: {reason}" for reason in results["left_out"]]
    ratios = [f"{row['size']}, {row['ranks']} ranks: {verdict_on(row)}" for row in staged]
    of_bytes = "Shared memory per rank, and bytes per version, against the formula"
    of_version = "One version, and one async_save of the same state to the disk"
    return [
        Table.of(of_bytes, found, *BYTES, notes=[BYTES_NOTE, *left_out]),
        Table.of(of_version, found, *VERSION, notes=[VERSION_NOTE]),
        Table.of(f"{STAGING_TITLE}, {alternating}", staged, *STAGING, notes=ratios),
        Table.of(f"{FROZEN_TITLE}, {alternating}", results["frozen"], *FROZEN, notes=[FROZEN_NOTE]),
    ]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(WIDTHS), help="model sizes")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="numbers of ranks (default: 2 4)")
    add_count(parser, "--cycles", 4, "measured versions per cell")


PROGRAM = Program(__doc__, measure, tables, options, shows_parts=True)

if __name__ == "__main__":
    PROGRAM.main()
