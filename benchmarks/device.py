"""The cost of mirroring every step on a CUDA device, compared with Lightning's `ddp`: one rank, alternating.

A device computes asynchronously, so the step time is the time of a segment until all its work is done, divided by the
number of steps.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Any

import torch
from rich.progress import Progress

from benchmarks import machine
from benchmarks.gpt import WIDTHS
from benchmarks.job import JobOptions
from benchmarks.quantiles import median
from benchmarks.report import Report, base_parser, console, progress_bar
from benchmarks.scratch import Scratch, scratch
from benchmarks.steady_state import state_bytes
from benchmarks.tables import Table
from benchmarks.threads import TurnsJob, fork_server

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "ckptless": ("ckptless", {}),
    "mirror_every_n_steps=10": ("ckptless", {"mirror_every_n_steps": 10}),
}
SIZES = ("33M", "124M", "345M")
WARM_UP_STEPS = 10


def measure(size: str, batch: int, steps: int, rounds: int, place: Scratch) -> dict[str, Any]:
    """Train a model size under each strategy, alternating. Returns the rank's reports on each segment, by strategy."""
    segments: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    with fork_server(machine.ROOT) as parent, ExitStack() as stack:
        jobs = {
            name: stack.enter_context(
                TurnsJob(
                    JobOptions(size, batch, strategy, options, 1, accelerator="gpu", turns=True, root=str(place.files)),
                    parent,
                    place,
                )
            )
            for name, (strategy, options) in VARIANTS.items()
        }
        for job in jobs.values():
            job.train(WARM_UP_STEPS)
        for _ in range(rounds):
            for name, job in jobs.items():
                segments[name].append(job.train(steps)[0].fields)
    return {"size": size, "batch": batch, "state_bytes": state_bytes(size), "segments": segments}


def step_table(results: list[dict[str, Any]]) -> Table:
    """Return the table of step times, and of the time to copy a version."""
    table = Table(
        "Step time on one device, one rank, alternating",
        ("model", "state MB", "batch", "strategy", "step ms", "over ddp ms", "over ddp", "training thread ms",
         "copied after ms", "copy GB/s"),
    )  # fmt: skip
    table.note(
        "Step: mean of a segment until all work on the device is done, median over segments. Training thread: its time "
        "per version. Copied after: from the commit point until the version is in shared memory, including the wait "
        "for the device to reach that point. One rank keeps no replicas, so nothing is sent."
    )
    for result in results:
        ddp = [segment["mean_s"] for segment in result["segments"]["ddp"]]
        for name, segments in result["segments"].items():
            means = [segment["mean_s"] for segment in segments]
            over = median([a - b for a, b in zip(means, ddp, strict=True)])
            commits = [value for segment in segments for value in segment.get("commit_s", ())]
            stages = [value for segment in segments for value in segment.get("stage_s", ())]
            copied = max((segment.get("staged_bytes", 0) for segment in segments), default=0)
            cells = [f"{1e3 * over:.2f}", f"{over / median(ddp):+.1%}"] if name != "ddp" else ["", ""]
            cells += [f"{1e3 * median(commits):.2f}"] if commits else [""]
            cells += [f"{1e3 * median(stages):.1f}", f"{copied / 1e9 / median(stages):.1f}"] if stages else ["", ""]
            head = [result["size"], f"{result['state_bytes'] / 1e6:.0f}", str(result["batch"]), name]
            table.add(*head, f"{1e3 * median(means):.2f}", *cells)
    return table


def run(sizes: list[str], batch: int, steps: int, rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """Measure all sizes."""
    task = progress.add_task("", total=len(sizes))
    results = []
    with scratch() as place:
        for size in sizes:
            progress.update(task, description=f"{size}, batch {batch}")
            results.append(measure(size, batch, steps, rounds, place))
            progress.advance(task)
    return results


def main() -> None:
    """Read the command line, measure, report."""
    parser: argparse.ArgumentParser = base_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(WIDTHS), help="model sizes")
    parser.add_argument("--batch", type=int, default=64, help="samples per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps per segment (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="segments per strategy (default: %(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        console.print("needs a CUDA device: torch finds none here")
        raise SystemExit(2)
    report = Report(args)
    with progress_bar() as progress:
        results = run(args.sizes, args.batch, args.steps, args.rounds, progress)
    report.finish([step_table(results)], {"sizes": results})


if __name__ == "__main__":
    main()
