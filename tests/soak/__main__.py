"""Run training jobs with random faults, and compare each run with an undisturbed one.

Stops at the first run that hangs, differs, loses a committed step, leaks something or recovers too slowly, and prints
the command that repeats it. If started again, it continues with the missing seeds.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness.benchmark import Steps, console, progress_bar
from lightning_ckptless.membership.launch.config import LaunchConfig
from lightning_ckptless.membership.launch.launch import make_parent
from lightning_ckptless.testing.starters import program_of
from tests import leaks
from tests.faults.conftest import LAB
from tests.soak.draw import scenario
from tests.soak.results import append, read, recovery_table, totals
from tests.soak.run import run
from tests.soak.scenario import Scenario
from tests.soak.stage import Undisturbed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", help="run these seeds, even if they have been run before")
    parser.add_argument("--first", type=int, default=1, help="the first seed of a long soak (default: %(default)s)")
    parser.add_argument("--faults", type=int, default=1000, help="number of faults to inject (default: %(default)s)")
    about = "folder for all files (default: %(default)s)"
    parser.add_argument("--folder", type=Path, default=Path("build/soak"), help=about)
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a run that fails")
    parser.add_argument("--dry", action="store_true", help="show the scenarios without running them")
    parser.add_argument("--summary", action="store_true", help="show the tables of the results so far, run nothing")
    return parser.parse_args()


def main() -> int:
    """Run the scenarios, and report; returns 1 if a run failed."""
    args = parse()
    # Like Ctrl-C: all started processes are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if args.dry:
        for wanted in args.seed or range(args.first, args.first + 20):
            show(scenario(wanted))
        return 0
    failed = 0 if args.summary else soak(args)
    results = read(args.folder / "results.jsonl")
    for table in (totals(results), recovery_table(results)):
        table.show(console)
    return int(failed > 0)


def soak(args: argparse.Namespace) -> int:
    """Run scenarios until enough faults have been injected; returns the number of failed runs."""
    # All processes that this one starts are marked, so that those left behind can be found.
    os.environ.setdefault(leaks.MARK, f"soak-{os.getpid()}")
    failed, folder = 0, args.folder.absolute()
    with make_parent(LaunchConfig(program=program_of([str(LAB)]))) as parent, progress_bar() as progress:
        steps = Steps(progress)
        steps.expect(None if args.seed else args.faults)
        for drawn in scenarios(args):
            steps.begin(str(drawn))
            files = folder / f"seed-{drawn.seed}"
            result = run(drawn, files, parent, Undisturbed(folder / "undisturbed", parent))
            append(folder / "results.jsonl", result)
            steps.done(len(result.struck))
            if not result.good:
                failed += 1
                show(drawn)
                console.print(f"{result.outcome}: {result.why}; files kept in {files}", markup=False)
                console.print(f"repeat: python -m tests.soak --seed {drawn.seed}", markup=False, style="bold red")
                if not args.keep_going:
                    break
    return failed


def scenarios(args: argparse.Namespace) -> Iterator[Scenario]:
    """Yield the scenarios to run: the requested seeds, or all that are missing or have failed."""
    if args.seed:
        yield from map(scenario, args.seed)
        return
    seed = args.first - 1
    while True:
        known = {result.seed: result for result in read(args.folder / "results.jsonl")}
        if sum(len(result.struck) for result in known.values() if result.good) >= args.faults:
            return
        seed += 1
        while seed in known and (known[seed].good or args.keep_going):
            seed += 1
        yield scenario(seed)


def show(drawn: Scenario) -> None:
    """Print a scenario with its faults."""
    console.print("\n    ".join((str(drawn), *drawn.faults)), markup=False)


if __name__ == "__main__":
    sys.exit(main())
