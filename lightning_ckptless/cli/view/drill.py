"""Renders a drill: progress bars while it runs, tables when it is done."""

from __future__ import annotations

import re
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from lightning_ckptless.protocol.phases import PHASES
from lightning_ckptless.protocol.wording import counted
from lightning_ckptless.testing.drill import DrillReport, Progress, Recovery

TITLES = {"baseline": "uninterrupted", "faulted": "with faults", "repeated": "repeated"}
MOST_SHOWN = 20


class _Mark(SpinnerColumn):
    """A spinner, then a green tick or a red cross."""

    def render(self, task: Task) -> RenderableType:
        if task.fields["failed"] is None:
            return super().render(task)
        return Text("✗", style="red") if task.fields["failed"] else Text("✓", style="green")


class ProgressView:
    """One progress bar per run. A context manager.

    Args:
        console: console that shows the bars.
    """

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            _Mark(),
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  {task.fields[events]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def update(self, progress: Progress) -> None:
        """Show the progress of a run."""
        task = self._tasks.get(progress.variant)
        if task is None:
            title = TITLES.get(progress.variant, progress.variant)
            task = self._tasks[progress.variant] = self._bars.add_task(title, total=progress.of, events="", failed=None)
        events = _events(progress.faults, progress.recoveries) if progress.faults else ""
        total = progress.step if progress.done else progress.of
        failed = progress.failed if progress.done else None
        self._bars.update(task, completed=progress.step, total=total, events=events, failed=failed)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()


def show_report(report: DrillReport, console: Console) -> None:
    """Print a report: faults, recoveries, what was compared, and the verdict."""
    console.print(faults_table(report))
    if report.recoveries:
        console.print(recoveries_table(report.recoveries))
    console.print(comparison_table(report))
    if report.verdict.differences:
        console.print(differences_table(report))
    for pattern in report.unused_patterns:
        console.print(f"--ignore {pattern}: matches no value", style="yellow", markup=False, soft_wrap=True)
    if report.identical:
        console.print(Text.assemble(("IDENTICAL", "bold green"), ": results match bit for bit"))
        return
    console.print(Text("NOT IDENTICAL", style="bold red"))
    for problem in report.problems:
        console.print(f"- {problem}", markup=False, highlight=False, soft_wrap=True)


def faults_table(report: DrillReport) -> Table:
    """The requested faults, and whether each was injected."""
    table = _table("Faults", "fault", "injected")
    for fault in report.faults:
        table.add_row(str(fault), Text("no", style="red") if fault in report.unfired else "yes")
    return table


def recoveries_table(recoveries: tuple[Recovery, ...]) -> Table:
    """One row per recovery, with its phases in milliseconds."""
    table = _table("Recoveries, in milliseconds", "cause", "from")
    shown = [name for name in PHASES if name != "other" or any(r.phases.get("other_s") for r in recoveries)]
    for heading in (*shown, "total"):
        # On a narrow terminal, fold the text columns instead of the numbers.
        table.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
    for recovery in recoveries:
        phases = [f"{1e3 * recovery.phases.get(f'{name}_s', 0.0):.0f}" for name in shown]
        table.add_row(short_cause(recovery), recovery.version, *phases, f"{1e3 * recovery.total_s:.0f}")
    return table


def short_cause(recovery: Recovery) -> str:
    """What happened to which rank; one line for each of several faults."""
    text = recovery.cause.replace("died by ", "").replace("exited with code", "exit")
    if "; then " in text:
        # Each fault names its rank, and the process, which is gone.
        return re.sub(r" \(pid \d+\)", ":", text).replace("; then ", "\n")
    return text if recovery.culprit_rank is None else f"rank {recovery.culprit_rank}: {text}"


def comparison_table(report: DrillReport) -> Table:
    """What was compared, and the first difference."""
    verdict = report.verdict
    table = _table("Runs", "", "uninterrupted", "with faults")
    seconds = [f"{run.wall_s:.1f} s" for run in (report.baseline, report.faulted)]
    table.add_row("took", *seconds)
    table.add_row("recovered in place", "0", str(report.in_place))
    table.add_row("relaunches", "0", str(report.relaunches))
    table.add_row("steps replayed", "0", str(sum(recovery.steps_replayed for recovery in report.recoveries)))
    table.add_row("points compared", str(verdict.points), f"{verdict.points + verdict.repeated}")
    table.add_row("log rows compared", str(verdict.rows), "")
    if verdict.ignored:
        table.add_row("values ignored", ", ".join(verdict.ignored), "")
    first = "none" if verdict.first is None else f"{verdict.first.where}: {verdict.first.field}"
    table.add_row("first difference", "", Text(first, style="green" if verdict.first is None else "red"))
    return table


def differences_table(report: DrillReport) -> Table:
    """The values that differ: how often, where first, and whether two runs without faults differ as well."""
    table = _table("Differences", "value", "times", "first at", "expected", "found")
    if report.repetition is not None:
        table.add_column("also without faults")
    by_field = report.verdict.by_field()
    for field, differences in list(by_field.items())[:MOST_SHOWN]:
        first = differences[0]
        also = [] if report.repetition is None else ["yes" if field in report.unrepeatable else "no"]
        table.add_row(field, str(len(differences)), first.where, first.expected, first.found, *also)
    if len(by_field) > MOST_SHOWN:
        table.add_row(f"and {len(by_field) - MOST_SHOWN} more", "", "", "", "")
    return table


def _events(faults: int, recoveries: int) -> str:
    return f"{counted(faults, 'fault')}, {counted(recoveries, 'recovery', 'recoveries')}"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
