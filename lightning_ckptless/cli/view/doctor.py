"""Renders the results of `ckptless doctor`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_ckptless.cli.checks.check import Check, Status
from lightning_ckptless.protocol.wording import counted

_COLOURS = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILURE: "bold red"}


def show_checks(checks: Sequence[Check], console: Console | None = None) -> None:
    """Print the results, then the fixes, then the verdict.

    Args:
        checks: checks in display order.
        console: output; None for stdout.
    """
    console = console or Console()
    console.print(_table(checks))
    for check in checks:
        if check.status is not Status.OK:
            console.print(_advice(check))
    console.print(_verdict(checks))


def _table(checks: Sequence[Check]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in checks:
        table.add_row(Text(check.status, style=_COLOURS[check.status]), Text(check.name), Text(check.found))
    return table


def _advice(check: Check) -> Table:
    advice = Table.grid(padding=(0, 2))
    advice.add_column(no_wrap=True)
    advice.add_column(overflow="fold")
    advice.add_row(Text(check.status, style=_COLOURS[check.status]), Text(check.name, style="bold"))
    advice.add_row("found", Text(check.found))
    advice.add_row("expected", Text(check.expected))
    advice.add_row("fix", Text(check.fix))
    advice.add_row()
    return advice


def _verdict(checks: Sequence[Check]) -> Text:
    counts = {status: sum(check.status is status for check in checks) for status in Status}
    if failures := counts[Status.FAILURE]:
        return Text(f"training will not work here: {counted(failures, 'failure')}", style=_COLOURS[Status.FAILURE])
    if warnings := counts[Status.WARNING]:
        return Text(f"training works here, with {counted(warnings, 'warning')}", style=_COLOURS[Status.WARNING])
    return Text(f"training works here: {len(checks)} checks passed", style=_COLOURS[Status.OK])
