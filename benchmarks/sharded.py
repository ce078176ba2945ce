"""Mirroring at size: models of 33, 100 and 300 million parameters on two and four CPU ranks, DDP and FSDP2.

Each job takes a version at every fourth step. The step at whose end it is taken and the step during which it is copied
are compared with the two in between, in the same job and seconds apart, so that no second job has to fit into memory.
Torch's `async_save` of the same state is measured in a separate job. Takes half an hour; five minutes with `--sizes
33M`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil

from benchmarks.harness.processes import scratch
from benchmarks.harness.report import Program, Results, Steps, add_count, console
from benchmarks.harness.table import Column, Table
from benchmarks.harness.turns import Plan, Segment, segment_of, train_in_turns
from benchmarks.harness.variants import slowest_ms
from benchmarks.harness.watch import NoRecoveryError, Watch
from benchmarks.jobs.async_save import saves_of
from benchmarks.jobs.gpt import LAYERS, WIDTHS, state_bytes
from benchmarks.jobs.job import JobOptions

EVERY = 4
"""Steps between two versions: a version is taken at the end of the last step and copied during the first."""
SIZES = ("33M", "100M", "300M")
RANKS = (2, 4)
BATCH = 1
SHARE_OF_MEMORY = 0.85
"""Share of free memory to use: torch and the kernel need some, too."""


@dataclass(frozen=True)
class Cell:
    """A model on a number of ranks, with FSDP2 or with DDP."""

    size: str
    ranks: int
    strategy: str
    state_bytes: int

    @property
    def is_sharded(self) -> bool:
        return self.strategy == "FSDP2"

    def needed_bytes(self, kept: int) -> int:
        """Return the bytes that training takes, and at most the arenas with `kept` shards of others per rank.

        Training takes state, gradients, and buffers: all gradients again with DDP; with FSDP2, the gathered weights and
        gradients of two blocks on each rank. The arenas have two slots per copy, plus those of the first step.
        """
        whole = self.state_bytes // 3
        arenas = 2 * (1 + kept) * self.state_bytes * 4 // 3
        if self.is_sharded:
            return self.state_bytes + whole + self.ranks * 4 * whole // LAYERS + arenas
        return self.ranks * (self.state_bytes + 2 * whole) + arenas

    def kept_shards(self, free_bytes: int) -> int | None:
        """Return the number of shards that a rank keeps for others, one or zero; None if the cell does not fit."""
        return next((kept for kept in (1, 0) if self.needed_bytes(kept) <= free_bytes), None)

    def __str__(self) -> str:
        return f"{self.size}, {self.strategy}, {self.ranks} ranks"


def cells(sizes: list[str], ranks: list[int]) -> list[Cell]:
    """Return all requested cells."""
    kinds = ("DDP", "FSDP2")
    return [Cell(size, count, kind, state_bytes(size)) for size in sizes for count in ranks for kind in kinds]


# ---------------------------------------------------------------------- measurement


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Train every cell that fits; results are stored as they arrive."""
    results |= {"cells": [], "left_out": []}
    wanted = cells(args.sizes, args.ranks)
    steps.expect(2 * len(wanted))
    for cell in wanted:
        steps.begin(str(cell))
        free_bytes = int(SHARE_OF_MEMORY * psutil.virtual_memory().available)
        if (kept := cell.kept_shards(free_bytes)) is None:
            needed_gb = cell.needed_bytes(0) / 1e9
            results["left_out"].append(f"{cell}: {needed_gb:.1f} GB needed, {free_bytes / 1e9:.1f} GB free")
            continue
        try:
            results["cells"].append(train(cell, kept, 1 if args.quick else args.cycles, steps))
        except NoRecoveryError as error:
            console.print(f"{cell}: {error}", markup=False)
            results["left_out"].append(f"{cell}: the job was lost")


def train(cell: Cell, kept: int, cycles: int, steps: Steps) -> Results:
    """Train a cell with mirroring, then with `async_save`."""
    chosen = {"mirror_every_n_steps": EVERY, "failure_domain": "rank" if kept else "node"}
    common = JobOptions(cell.size, BATCH, devices=cell.ranks, sharded=cell.is_sharded)
    jobs = {
        "mirrored": common.but(strategy="ckptless", strategy_options=chosen),
        "saved": common.but(async_save_every=EVERY),
    }

    def saving_segment(watch: Watch, folder: Path, count: int) -> Segment:
        return {**segment_of(watch, folder, count, warm_up=0), "saves": saves_of(folder)}

    found = {**asdict(cell), "kept": kept}
    for name, job in jobs.items():
        plan = Plan(1, (EVERY * cycles, EVERY * cycles))
        with scratch() as place:
            found[name] = train_in_turns({name: job}, place, plan, steps.done, saving_segment)[name][0]
    return found


# ---------------------------------------------------------------------- tables


def version_costs_ms(cell: Results) -> list[float]:
    """Return the cost of each version in ms: the two steps that it affects, minus the two in between.

    The steps are whole cycles of four: a version is taken at the end of the last, and copied during the first.
    """
    steps = slowest_ms(cell["mirrored"])
    cycles = [steps[at : at + EVERY] for at in range(0, len(steps), EVERY)]
    return [first + last - second - third for first, second, third, last in cycles]


def plain_step_ms(cell: Results) -> float:
    """Return the median of the steps that no version affects."""
    return median(step for at, step in enumerate(slowest_ms(cell["mirrored"])) if at % EVERY in (1, 2))


def part_ms(name: str) -> Callable[[Results], list[float]]:
    return lambda cell: [1e3 * value for rank in cell["mirrored"]["ranks"] for value in rank.get(name, ())]


def save_ms(name: str) -> Callable[[Results], list[float]]:
    return lambda cell: [1e3 * save[name] for save in cell["saved"]["saves"]]


def spread(values: list[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}"


def formula_mb(cell: Results) -> float:
    return float(2 * (1 + cell["kept"]) / cell["ranks"] * cell["state_bytes"] / 1e6)


def arena_mb(cell: Results) -> float:
    return float(cell["mirrored"]["ranks"][0]["arena_bytes"] / cell["ranks"] / 1e6)


CELL = (Column("model", "size"), Column("strategy", "strategy"), Column("ranks", "ranks"))
BYTES = (
    *CELL,
    Column("state MB", lambda cell: cell["state_bytes"] / 1e6, ".0f"),
    Column("kept", "kept"),
    Column("formula MB", formula_mb, ".0f"),
    Column("arena per rank MB", arena_mb, ".0f"),
    Column("over the formula", lambda cell: arena_mb(cell) / formula_mb(cell) - 1, "+.2%"),
    Column("sent MB", lambda cell: max(rank["sent_bytes"] for rank in cell["mirrored"]["ranks"]) / 1e6, ".0f"),
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


def tables(_: Namespace, results: Results) -> list[Table]:
    left_out = [f"Left out: {reason}" for reason in results["left_out"]]
    of_bytes = "Shared memory per rank, and bytes per version, against the formula"
    of_version = "One version, and one async_save of the same state to the disk"
    return [
        Table.of(of_bytes, results["cells"], *BYTES, notes=[BYTES_NOTE, *left_out]),
        Table.of(of_version, results["cells"], *VERSION, notes=[VERSION_NOTE]),
    ]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(WIDTHS), help="model sizes")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="numbers of ranks (default: 2 4)")
    add_count(parser, "--cycles", 4, "measured versions per cell")


PROGRAM = Program(__doc__, measure, tables, options, shows_parts=True)

if __name__ == "__main__":
    PROGRAM.main()
