"""Command to the first optimizer step that all ranks have finished, compared with Lightning's `ddp`.

All command lines start the same script, alternate, and end after the first step. The script reports when it begins,
when torch and Lightning are imported, when it calls `fit`, and when the step is done.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress

from benchmarks.job import JobOptions
from benchmarks.processes import Command, job_environment, with_ckptless_run, with_python, with_torchrun
from benchmarks.quantiles import median, summary
from benchmarks.recoveries import START_S, Watch
from benchmarks.report import Report, base_parser, progress_bar
from benchmarks.scratch import Scratch, scratch
from benchmarks.tables import Table, verdict
from benchmarks.wire import Inbox
from lightning_ckptless import environment

RANKS = 2
BASE = "python, ddp"
TARGETS = {"ckptless run": 1.0, "python, ckptless": 1.3}
"""Longest time allowed, as a multiple of `BASE`."""


@dataclass(frozen=True)
class Launcher:
    """A way to start the script.

    Args:
        name: name in the tables.
        command: builds the command line.
        strategy: strategy of the script.
    """

    name: str
    command: Callable[[JobOptions], list[str]]
    strategy: str


LAUNCHERS = (
    Launcher(BASE, with_python, "ddp"),
    Launcher("ckptless run", with_ckptless_run, "ckptless"),
    Launcher("ckptless run --no-preload", lambda options: with_ckptless_run(options, "--no-preload"), "ckptless"),
    Launcher("python, ckptless", with_python, "ckptless"),
    Launcher("torchrun, ddp", with_torchrun, "ddp"),
    Launcher("torchrun, ckptless", with_torchrun, "ckptless"),
)


def start_once(launcher: Launcher, size: str, place: Scratch, name: str) -> dict[str, Any]:
    """Start the script, wait for its first step and its end.

    Returns:
        Seconds to the first step and to the end, and the milestones of each rank in seconds since the command.
    """
    folder = place.files / name
    folder.mkdir()
    options = JobOptions(size, 2, launcher.strategy, devices=RANKS, steps=1, root=str(folder))
    with Inbox(place.files / f"{name}.socket") as inbox:
        env = {**job_environment(inbox.path), environment.ARENA_DIR: str(place.arenas)}
        with Command(launcher.command(options), folder, env) as command:
            watch = Watch(inbox, command, RANKS)
            lives = watch.until(lambda found: all(life.first_step for life in found), START_S, "the first step")
            exit_code = command.wait(START_S)
            ended_at = time.time()
            assert exit_code == 0, f"{launcher.name}: exit code {exit_code}\n{command.output_tail()}"
    since = command.began_at
    return {
        "seconds": max(life.moments["step"] for life in lives) - since,
        "ended_s": ended_at - since,
        "first_script": min(life.moments["script"] for life in watch.lives.values() if life.moments) - since,
        "ranks": [{moment: at - since for moment, at in life.moments.items()} for life in lives],
    }


def run(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Start each launcher `args.repeats` times, alternating, after one warm-up round."""
    results: dict[str, list[Any]] = {launcher.name: [] for launcher in LAUNCHERS}
    task = progress.add_task("", total=len(LAUNCHERS) * (args.repeats + 1))
    with scratch() as place:
        for repeat in range(-1, args.repeats):
            for index, launcher in enumerate(LAUNCHERS):
                progress.update(task, description=launcher.name if repeat >= 0 else f"warm-up, {launcher.name}")
                found = start_once(launcher, args.size, place, f"{index}-{repeat + 1}")
                if repeat >= 0:
                    results[launcher.name].append(found)
                progress.advance(task)
    return results


def summary_table(results: dict[str, Any]) -> Table:
    """Return the table of start times, compared with the targets."""
    table = Table(
        "Command to the first optimizer step finished by two ranks",
        (
            "launcher, strategy",
            "starts",
            "p50 s",
            "min s",
            "max s",
            f"relative to {BASE}",
            "to the end of the command s",
        ),
        notes=["Relative: median over rounds of the quotient within the round."],
    )
    for name, starts in results.items():
        seconds = summary([start["seconds"] for start in starts])
        quotient = median([a["seconds"] / b["seconds"] for a, b in zip(starts, results[BASE], strict=True)])
        ended = median([start["ended_s"] for start in starts])
        three = [f"{seconds[key]:.2f}" for key in ("p50", "min", "max")]
        table.add(name, len(starts), *three, f"{quotient:.2f}", f"{ended:.2f}")
        if name in TARGETS:
            table.note(f"{name}: {verdict(quotient, TARGETS[name], f'x {BASE}')}")
    return table


def moments_table(results: dict[str, Any]) -> Table:
    """Return the table of milestones."""
    moments = ("script", "imported", "fit", "train", "step")
    table = Table(
        "Milestones, slowest rank, medians in s since the command",
        ("launcher, strategy", "first line of the script", "of the last rank", "imported", "fit called", "training",
         "first step done"),
    )  # fmt: skip
    table.note(
        "With `python` the first process runs the script up to `fit`. There, with ddp, it is rank 0 and starts the "
        "other rank; with ckptless it becomes the agent.",
    )
    for name, starts in results.items():
        cells = [f"{median([max(rank[m] for rank in start['ranks']) for start in starts]):.2f}" for m in moments]
        table.add(name, f"{median([start['first_script'] for start in starts]):.2f}", *cells)
    return table


def main() -> None:
    """Read the command line, measure, report."""
    parser = base_parser(__doc__)
    parser.add_argument("--repeats", type=int, help="starts of each command line (default: 10; 1 with --quick)")
    parser.add_argument("--size", default="1M", help="model that is trained (default: 1M)")
    args = parser.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 10)
    report = Report(args)
    with progress_bar() as progress:
        results = run(args, progress)
    report.finish([summary_table(results), moments_table(results)], results)


if __name__ == "__main__":
    main()
