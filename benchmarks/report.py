"""What all programs share: command line options, progress display, and output of the results."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import machine
from benchmarks.tables import Table

WIDTH = 150

console = Console(width=None if sys.stdout.isatty() else WIDTH)


def base_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every program has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats: a smoke test, not a measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and all repeats to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
    parser.add_argument(
        "--max-load",
        type=float,
        default=1.5,
        help="wait until the load average is at most this before measuring (default: 1.5)",
    )
    parser.add_argument(
        "--patience", type=float, default=600.0, help="longest wait for a quiet machine, in seconds (default: 600)"
    )
    return parser


def progress_bar() -> Progress:
    """Return a progress bar with the current activity, the count and the elapsed time."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


class Report:
    """The result of a program: records the machine's load before and after, prints and writes tables.

    Args:
        args: parsed options of `base_parser`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        # Like Ctrl-C: all started processes are ended, and the folders are removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        if not args.quick and not machine.wait_until_quiet(args.max_load, args.patience):
            console.print(f"the machine is still busy (load {machine.load()[0]}); measuring anyway")
        self.load_before = machine.load()

    def finish(self, tables: list[Table], results: dict[str, Any]) -> None:
        """Print the tables, and write the files that were requested."""
        known = machine.facts() | {"load_before": self.load_before, "load_after": machine.load()}
        head = f"{machine.describe(known)}; load {self.load_before[0]} before, {known['load_after'][0]} after"
        console.print(head)
        for table in tables:
            table.show(console)
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.args).items()}
        if self.args.json:
            whole = {"machine": known, "options": options, "results": results}
            self.args.json.write_text(json.dumps(whole, indent=1) + "\n")
        if self.args.markdown:
            self.args.markdown.write_text("\n".join([f"{head}.", "", *(table.markdown() for table in tables)]))
