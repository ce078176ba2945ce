"""A benchmark is a dataclass whose fields are its options. It measures, and makes tables of what it has found."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, cast

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.harness.processes import ROOT
from benchmarks.harness.table import Table

console = Console(width=None if sys.stdout.isatty() else 150)
Results = dict[str, Any]
QUIET_LOAD = 1.5


def option(default: Any, about: str, *, quick: Any = None, choices: Sequence[str] = ()) -> Any:
    """Return a field of a benchmark that is an option of its command; a tuple takes several values.

    Args:
        default: default.
        about: explanation for `--help`.
        quick: default with `--quick`, if it differs.
        choices: allowed values.
    """
    return field(default=default, metadata={"about": about, "quick": quick, "choices": choices})


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


@dataclass
class Benchmark:
    """A program that measures; the docstring of its module says what."""

    quick: bool = option(False, "fewer repeats: a smoke test, not a measurement")
    patience: float = option(600.0, f"longest wait for a load of at most {QUIET_LOAD}, in seconds")
    folder: str = option("", "write all repeats as JSON, and the tables as Markdown, to files in this folder")

    def measure(self, results: Results, steps: Steps) -> None:
        """Measure, and store what was found."""
        raise NotImplementedError

    def tables(self, results: Results) -> list[Table]:
        """Return the tables of the results."""
        raise NotImplementedError

    @classmethod
    def parse(cls, words: Sequence[str] | None = None) -> Self:
        """Return the benchmark with the options of a command line."""
        about = sys.modules[cls.__module__].__doc__
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        for each in fields(cls):
            name, default = f"--{each.name.replace('_', '-')}", cast("Any", each.default)
            if isinstance(default, bool):
                parser.add_argument(name, action="store_true", help=each.metadata["about"])
                continue
            several = isinstance(default, tuple)
            parser.add_argument(
                name, type=type(default[0]) if several and default else str if several else type(default),
                nargs="+" if several else None, choices=each.metadata["choices"] or None, metavar="VALUE",
                help=each.metadata["about"] + _defaults(default, each.metadata["quick"], each.metadata["choices"]),
            )  # fmt: skip
        chosen = vars(parser.parse_args(words))
        smaller = {each.name: each.metadata["quick"] for each in fields(cls) if chosen["quick"]}
        given: dict[str, Any] = {}
        for name, value in (*smaller.items(), *chosen.items()):
            given |= {} if value is None else {name: tuple(value) if isinstance(value, list) else value}
        return cls(**given)

    @classmethod
    def main(cls) -> None:
        """Read the command line, measure, report."""
        self = cls.parse()
        # Like Ctrl-C: all started processes are ended, and the folders are removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        self._wait_for_a_quiet_machine()
        before, results = os.getloadavg()[0], Results()
        with progress_bar() as progress:
            self.measure(results, Steps(progress))
        known = machine() | {"load_before": round(before, 2), "load_after": round(os.getloadavg()[0], 2)}
        head = f"{describe(known)}; load {known['load_before']} before, {known['load_after']} after."
        tables = self.tables(results)
        console.print(head)
        for table in tables:
            table.show(console)
        if self.folder:
            file = Path(self.folder, Path(sys.modules[cls.__module__].__file__ or "").stem)
            file.parent.mkdir(parents=True, exist_ok=True)
            whole = {"machine": known, "options": asdict(self), "results": results}
            file.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
            file.with_suffix(".md").write_text("\n".join([head, "", *(table.markdown() for table in tables)]))

    def _wait_for_a_quiet_machine(self) -> None:
        until = time.monotonic() + (0.0 if self.quick else self.patience)
        while os.getloadavg()[0] > QUIET_LOAD:
            if time.monotonic() > until:
                console.print(f"the machine is busy (load {os.getloadavg()[0]:.1f}); measuring anyway")
                return
            time.sleep(5.0)


def _defaults(default: Any, quick: Any, choices: Sequence[str]) -> str:
    usual, less = (" ".join(map(str, value)) if isinstance(value, tuple) else value for value in (default, quick))
    known = [f"default: {usual}"] if usual not in ("", 0) else []
    known += [f"{less or 'none'} with --quick"] if quick is not None else []
    known += [f"one of: {' | '.join(choices)}"] if choices else []
    return f" ({'; '.join(known)})" if known else ""


# ---------------------------------------------------------------------- the machine


def machine() -> dict[str, Any]:
    """Return hardware, versions and date."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    words = ["git", "describe", "--always", "--dirty=+"]
    commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpus[0].partition(":")[2].strip() if cpus else platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning")},
        "commit": commit or "unknown",
    }


def describe(known: dict[str, Any]) -> str:
    """Return hardware, versions and date in words."""
    device = f", one {known['device']}" if known["device"] else ""
    return (
        f"{known['date']}; {known['cores']} cores of {known['cpu']}, {known['memory_gib']} GiB{device}; "
        f"Python {known['python']}, torch {known['torch']}, lightning {known['lightning']}, commit {known['commit']}"
    )
