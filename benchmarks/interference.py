"""The cost of the mirror thread to training on shared cores, and whether a lower scheduling priority reduces it.

Two ranks of the same job train on two cores under each variant: unmodified, with a nice level for the mirror thread,
under batch scheduling, and with one thread for its copies. The variants run at the same time and alternate in short
segments. Takes five minutes.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from rich.progress import Progress

from benchmarks import machine
from benchmarks.gpt import WIDTHS
from benchmarks.job import JobOptions
from benchmarks.quantiles import median
from benchmarks.report import Report, base_parser, progress_bar
from benchmarks.scratch import Scratch, scratch
from benchmarks.steady_state import segment_of
from benchmarks.steady_tables import cpu_ms, over_ddp, part_ms, step_ms
from benchmarks.tables import Table
from benchmarks.threads import TurnsJob, fork_server

RANKS = 2
WARM_UP_STEPS = 8
SCHEDULING = {"unmodified": "", "nice 10": "nice", "batch scheduling": "batch", "one thread": "one"}
"""Variants by their name in the table: see `training.MIRROR_SCHEDULING`."""


def measure(size: str, rounds: int, steps: int, place: Scratch, advance: Any) -> dict[str, Any]:
    """Train a model size under each variant, alternating."""
    segments: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ddp", *SCHEDULING)}
    with fork_server(machine.ROOT) as parent, ExitStack() as stack:
        jobs = {}
        for name in segments:
            strategy, scheduling = ("ddp", "") if name == "ddp" else ("ckptless", SCHEDULING[name])
            options = JobOptions(
                size, 2, strategy, devices=RANKS, turns=True, root=str(place.files), mirror_scheduling=scheduling
            )
            jobs[name] = stack.enter_context(TurnsJob(options, parent, place))
            jobs[name].train(WARM_UP_STEPS)
        for _ in range(rounds):
            for name, job in jobs.items():
                segments[name].append(segment_of(job, steps))
            advance()
    return {"size": size, "batch": 2, "segments": segments}


def interference_table(results: dict[str, Any]) -> Table:
    """Return the table of the step and CPU time of each variant, compared with `ddp`."""
    table = Table(
        f"Cost of a mirrored step by scheduling of the mirror thread, {RANKS} CPU ranks, alternating",
        ("model", "variant", "step ms", "over ddp ms", "min to max", "CPU over ddp ms", "staged after ms",
         "committed after ms", "cores used by others"),
    )  # fmt: skip
    table.note(
        "Medians of a segment on the slower rank; over ddp: median over rounds of the difference from its segment."
    )
    for pair in results["pairs"]:
        for name, segments in pair["segments"].items():
            over, cpu = over_ddp(pair, name), over_ddp(pair, name, cpu_ms)
            others = median([segment["cores_used_by_others"] for segment in segments])
            table.add(
                pair["size"], name, f"{median([step_ms(s) for s in segments]):.2f}", f"{median(over):.2f}",
                f"{min(over):.2f} to {max(over):.2f}", f"{median(cpu):.2f}", f"{part_ms(segments, 'stage_s'):.2f}",
                f"{part_ms(segments, 'round_s'):.2f}", f"{others:.2f}",
            )  # fmt: skip
    return table


def run(sizes: list[str], rounds: int, progress: Progress) -> dict[str, Any]:
    """Measure all sizes."""
    task = progress.add_task("", total=rounds * len(sizes))
    results: dict[str, Any] = {"pairs": []}
    for size in sizes:
        progress.update(task, description=f"{size}, {len(SCHEDULING) + 1} variants alternating")
        steps = 40 if size == "tiny" else 8
        with scratch() as place:
            results["pairs"].append(measure(size, rounds, steps, place, lambda: progress.advance(task)))
    return results


def main() -> None:
    """Read the command line, measure, report."""
    parser = base_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "10M"], choices=list(WIDTHS), help="model sizes")
    parser.add_argument("--rounds", type=int, default=20, help="segments per variant (default: 20)")
    args = parser.parse_args()
    report = Report(args)
    torch.set_num_threads(1)
    with progress_bar() as progress:
        results = run(args.sizes, 3 if args.quick else args.rounds, progress)
    report.finish([interference_table(results)], results)


if __name__ == "__main__":
    main()
