"""A benchmark's command line: options, a wait for a quiet machine, progress, and output of the results."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.harness import machine
from benchmarks.harness.table import Table

console = Console(width=None if sys.stdout.isatty() else 150)
Results = dict[str, Any]


class Default(NamedTuple):
    """The default of an option that `--quick` makes smaller."""

    usual: int
    quick: int

    def __str__(self) -> str:
        return f"{self.usual}; {self.quick} with --quick"


def add_count(parser: ArgumentParser, name: str, default: int | Default, about: str) -> None:
    """Add an option that takes a number."""
    parser.add_argument(name, type=int, default=default, help=f"{about} (default: %(default)s)")


def add_choice(parser: ArgumentParser, name: str, choices: list[str], about: str) -> None:
    """Add an option that selects some of several names; all by default."""
    named = "; ".join(choices)
    parser.add_argument(name, nargs="+", choices=choices, metavar="NAME", help=f"{about} (default: all): {named}")


class Steps:
    """The progress of a measurement on the terminal: the current activity, the count and the elapsed time."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._task = progress, progress.add_task("", total=None)

    def expect(self, total: int | None) -> None:
        self._progress.update(self._task, total=total)

    def begin(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def done(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)


def progress_bar() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)


@dataclass(frozen=True)
class Program:
    """A benchmark.

    Args:
        about: what it measures, for `--help`.
        measure: measures, and stores what it has found in the given results.
        tables: tables of the results.
        options: adds options to those that every benchmark has.
        shows_parts: whether the tables can show what was measured until an interruption.
    """

    about: str | None
    measure: Callable[[Namespace, Results, Steps], None]
    tables: Callable[[Namespace, Results], list[Table]]
    options: Callable[[ArgumentParser], None] = lambda _: None
    shows_parts: bool = False

    def main(self) -> None:
        """Read the command line, measure, report."""
        args = self.parse()
        # Like Ctrl-C: all started processes are ended, and the folders are removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        if not args.quick and not machine.wait_until_quiet(args.max_load, args.patience):
            console.print(f"the machine is still busy (load {machine.load()[0]}); measuring anyway")
        before, results = machine.load(), Results()
        try:
            with progress_bar() as progress:
                self.measure(args, results, Steps(progress))
        except BaseException:
            if self.shows_parts and results:
                self._report(args, results, before)
            raise
        self._report(args, results, before)

    def parse(self, words: list[str] | None = None) -> Namespace:
        """Return the options of a command line."""
        parser = ArgumentParser(description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="fewer repeats: a smoke test, not a measurement")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and all repeats to FILE")
        parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
        about = "wait until the load average is at most this before measuring (default: %(default)s)"
        parser.add_argument("--max-load", type=float, default=1.5, help=about)
        about = "longest wait for a quiet machine, in seconds (default: %(default)s)"
        parser.add_argument("--patience", type=float, default=600.0, help=about)
        self.options(parser)
        args = parser.parse_args(words)
        for name, value in vars(args).items():
            if isinstance(value, Default):
                setattr(args, name, value.quick if args.quick else value.usual)
        return args

    def _report(self, args: Namespace, results: Results, before: list[float]) -> None:
        """Print the tables, and write the files that were requested."""
        known = machine.facts() | {"load_before": before, "load_after": machine.load()}
        tables = self.tables(args, results)
        head = f"{machine.describe(known)}; load {before[0]} before, {known['load_after'][0]} after"
        console.print(head)
        for table in tables:
            table.show(console)
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        if args.json:
            whole = {"machine": known, "options": options, "results": results}
            args.json.write_text(json.dumps(whole, indent=1) + "\n")
        if args.markdown:
            args.markdown.write_text("\n".join([f"{head}.", "", *(table.markdown() for table in tables)]))
