"""Mirroring at size: models of 33, 100 and 300 million parameters on two and four CPU ranks, DDP and FSDP2.

Each job takes a version at every fourth step. The step at whose end it is taken and the step during which it is copied
are compared with the two in between, in the same job and seconds apart, so that no second job has to fit into memory.
Torch's `async_save` of the same state is measured in a separate job. Takes half an hour; five minutes with `--sizes
33M`.
"""

from __future__ import annotations

import json
from typing import Any

import psutil
import torch
from rich.progress import Progress

from benchmarks import machine
from benchmarks.async_save import NOTES
from benchmarks.gpt import WIDTHS
from benchmarks.job import JobOptions
from benchmarks.report import Report, base_parser, console, progress_bar
from benchmarks.scratch import Scratch, scratch
from benchmarks.sharded_cells import Cell, Fit, fit
from benchmarks.sharded_tables import bytes_table, frozen_table, staging_table, step_table
from benchmarks.stage import measure_frozen, measure_staging
from benchmarks.steady_state import state_bytes
from benchmarks.threads import JobLostError, TurnsJob, fork_server

EVERY = 4
"""Steps between two versions: a version is taken at the end of the last step and copied during the first."""
SIZES = ("33M", "100M", "300M")
RANKS = (2, 4)
BATCH = 1
SHARE_OF_MEMORY = 0.85
"""Share of free memory to use: torch and the kernel need some, too."""


def cells(sizes: list[str], ranks: list[int]) -> list[Cell]:
    """Return all requested cells."""
    return [
        Cell(size, state_bytes(size) // 12, count, is_sharded)
        for size in sizes
        for count in ranks
        for is_sharded in (False, True)
    ]


def measure(cell: Cell, found: Fit, cycles: int, place: Scratch) -> dict[str, Any]:
    """Train a cell with mirroring, then with `async_save`."""
    assert found.kept is not None
    domain = "rank" if found.kept else "node"
    ours = {"mirror_every_n_steps": EVERY, "failure_domain": domain}
    mirrored, reports, _ = _train(cell, "ckptless", ours, cycles, place)
    plain, _, saves = _train(cell, "ddp", {}, cycles, place, async_save_every=EVERY)
    return {
        **vars(cell), "strategy": cell.strategy, "state_bytes": cell.state_bytes, "kept": found.kept,
        "steps_s": mirrored, "rank_reports": reports, "async_steps_s": plain, "saves": saves,
    }  # fmt: skip


def _train(
    cell: Cell,
    strategy: str,
    strategy_options: dict[str, Any],
    cycles: int,
    place: Scratch,
    *,
    async_save_every: int = 0,
) -> tuple[list[float], list[dict[str, Any]], list[dict[str, float]]]:
    """Return the step times on the slowest rank, the reports of the ranks, and the records of `async_save`."""
    options = JobOptions(
        cell.size,
        BATCH,
        strategy,
        strategy_options,
        cell.ranks,
        turns=True,
        root=str(place.files),
        async_save_every=async_save_every,
        sharded=cell.is_sharded,
    )
    with fork_server(machine.ROOT) as parent, TurnsJob(options, parent, place) as job:
        job.train(EVERY)
        notes = job.train(EVERY * cycles)
        steps_s = [max(step) for step in zip(*(note.fields["steps_s"] for note in notes), strict=True)]
        folder = job.folder
    saved = folder / "saves" / NOTES
    saves = [json.loads(line) for line in saved.read_text().splitlines()] if saved.exists() else []
    return steps_s, [note.fields for note in notes], saves


def run(args: Any, results: dict[str, Any], progress: Progress) -> None:
    """Measure every cell that fits, and store the results as they arrive."""
    wanted = cells(args.sizes, args.ranks)
    task = progress.add_task("", total=len(wanted) + len(args.sizes))
    for size in args.sizes:
        progress.update(task, description=f"staging, {size}")
        with scratch() as place:
            repeats = 3 if args.quick else 10
            for ranks in args.ranks:
                staged = measure_staging(size, place.arenas, ranks=ranks, repeats=repeats)
                results["staging"].append({"ranks": ranks, **staged})
            results["frozen"].append(measure_frozen(size, place.arenas, ranks=2, repeats=repeats))
        progress.advance(task)
    for cell in wanted:
        progress.update(task, description=f"{cell.size}, {cell.strategy}, {cell.ranks} ranks")
        found = fit(cell, int(SHARE_OF_MEMORY * psutil.virtual_memory().available))
        if found.kept is None:
            results["left_out"].append(found.reason)
        else:
            with scratch() as place:
                try:
                    results["cells"].append(measure(cell, found, args.cycles, place))
                except JobLostError as error:
                    console.print(f"{cell}: {error}", markup=False)
                    results["left_out"].append(f"{cell.size}, {cell.strategy}, {cell.ranks} ranks: the job was lost")
        progress.advance(task)


def main() -> None:
    """Read the command line, measure, report."""
    parser = base_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(WIDTHS), help="model sizes")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="numbers of ranks (default: 2 4)")
    parser.add_argument("--cycles", type=int, default=4, help="measured versions per cell (default: 4)")
    args = parser.parse_args()
    report = Report(args)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"cells": [], "staging": [], "frozen": [], "left_out": []}
    try:
        with progress_bar() as progress:
            run(args, results, progress)
    finally:
        # An interrupted run still reports what was measured until then.
        tables = [bytes_table(results), step_table(results), staging_table(results), frozen_table(results)]
        report.finish(tables, results)


if __name__ == "__main__":
    main()
