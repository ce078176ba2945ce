"""Run training jobs with random faults, and compare each run with an undisturbed one.

Stops at the first run that hangs, differs, loses a committed step, leaks something or recovers too slowly, and prints
the command that repeats it. If started again, it continues with the missing seeds.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.progress import Progress

from benchmarks.harness.report import console, progress_bar
from benchmarks.soak.draw import scenario
from benchmarks.soak.processes import mark
from benchmarks.soak.results import Result, append, read
from benchmarks.soak.run import run
from benchmarks.soak.scenario import Scenario
from benchmarks.soak.stage import Undisturbed
from benchmarks.soak.summary import tables
from lightning_ckptless.membership.launch.config import LaunchConfig
from lightning_ckptless.membership.launch.launch import make_parent
from lightning_ckptless.testing.starters import program_of
from tests.faults.conftest import LAB


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", help="run these seeds, even if they have been run before")
    parser.add_argument("--first", type=int, default=1, help="the first seed of a long soak (default: %(default)s)")
    parser.add_argument("--faults", type=int, default=1000, help="number of faults to inject (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/soak"), help="folder for all files (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, help="file for the results (default: results.jsonl in the folder)")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a run that fails")
    parser.add_argument("--dry", action="store_true", help="show the scenarios without running them")
    parser.add_argument(
        "--summary", action="store_true", help="show the tables of the results without running anything"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
    args = parser.parse_args()
    args.results = args.results or args.folder / "results.jsonl"
    return args


def main() -> int:
    """Read the command line, run the scenarios, report.

    Returns:
        Exit code: 1 if a run failed.
    """
    args = options()
    # Like Ctrl-C: all started processes are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if args.dry:
        for wanted in args.seed or range(args.first, args.first + 20):
            show(scenario(wanted))
        return 0
    failed = 0 if args.summary else soak(args)
    results = read(args.results)
    found = tables(results)
    for table in found:
        table.show(console)
    if args.markdown:
        args.markdown.write_text("\n".join(table.markdown() for table in found))
    return int(failed > 0)


def soak(args: argparse.Namespace) -> int:
    """Run scenarios until enough faults have been injected; returns the number of failed runs."""
    mark()
    failed = 0
    with make_parent(LaunchConfig(program=program_of([str(LAB)]))) as parent, progress_bar() as progress:
        task = progress.add_task("", total=None if args.seed else args.faults, completed=0)
        for drawn in scenarios(args, progress, task):
            progress.update(task, description=str(drawn))
            undisturbed = Undisturbed((args.folder / "undisturbed").absolute(), parent)
            result = run(drawn, (args.folder / f"seed-{drawn.seed}").absolute(), parent, undisturbed)
            append(args.results, result)
            progress.advance(task, len(result.struck))
            if not result.good:
                failed += 1
                report_failure(drawn, result)
                if not args.keep_going:
                    break
    return failed


def scenarios(args: argparse.Namespace, progress: Progress, task: object) -> Iterator[Scenario]:
    """Yield the scenarios to run: the requested seeds, or all that are missing or have failed."""
    if args.seed:
        yield from map(scenario, args.seed)
        return
    seed = args.first - 1
    while True:
        known = {result.seed: result for result in read(args.results)}
        struck = sum(len(result.struck) for result in known.values() if result.good)
        progress.update(task, completed=struck)  # type: ignore[arg-type]
        seed += 1
        while seed in known and (known[seed].good or args.keep_going):
            seed += 1
        if struck >= args.faults:
            return
        yield scenario(seed)


def show(drawn: Scenario) -> None:
    """Print a scenario with its faults."""
    console.print(str(drawn), markup=False)
    for fault in drawn.faults:
        console.print(f"    {fault}", markup=False)


def report_failure(drawn: Scenario, result: Result) -> None:
    """Print why a run failed, and the command that repeats it."""
    show(drawn)
    console.print(f"{result.outcome}: {result.why}; files kept in {result.folder}", markup=False)
    console.print(f"repeat: {drawn.repeat}", markup=False, style="bold red")


if __name__ == "__main__":
    sys.exit(main())
