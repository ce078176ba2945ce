"""Tables of results: each column is a function of a row; shown on a terminal or written as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table as RichTable


class Column(NamedTuple):
    """A column of a table.

    Args:
        head: heading.
        value: key or index of the row, or function of the row; None leaves the cell empty.
        form: format of the value.
        of: statistic of the values, if there are several per row; the cell is empty if there are none.
    """

    head: str
    value: str | int | Callable[[Any], Any]
    form: str = ""
    of: Callable[[Any], object] | None = None

    def cell(self, row: Any) -> str:
        value = self.value(row) if callable(self.value) else row[self.value]
        if self.of is not None:
            value = self.of(value) if value else None
        return "" if value is None else format(value, self.form)


class Group(NamedTuple):
    """A row that has several measurements of the same kind.

    Args:
        name: what was measured.
        items: the measurements.
        context: what else belongs to the row.
    """

    name: str
    items: list[Any]
    context: Any = None


def count_of(group: Group) -> int:
    return len(group.items)


def each(key: str) -> Callable[[Group], list[float]]:
    """Return a function that returns the values of each item of a group that has them."""
    return lambda group: [item[key] for item in group.items if key in item]


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile of at least one value, interpolated between the two nearest ones."""
    return quantiles(values if len(values) > 1 else [*values, *values], n=100, method="inclusive")[percent - 1]


def p95(values: Sequence[float]) -> float:
    return percentile(values, 95)


def verdict(measured: float, target: float, unit: str) -> str:
    """Compare a measured value with a target that it should not exceed, in words."""
    word = "met" if measured <= target else "missed"
    return f"{measured:.2f} {unit} (target {target:g} {unit}): {word}"


@dataclass(frozen=True)
class Table:
    """A table of text; all columns but the first are right-aligned, and notes are sentences below it."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, title: str, rows: Iterable[Any], *columns: Column, notes: Iterable[str] = ()) -> Table:
        """Return the table of some rows, in the given columns."""
        cells = [tuple(column.cell(row) for column in columns) for row in rows]
        return cls(title, tuple(column.head for column in columns), cells, list(notes))

    def show(self, console: Console) -> None:
        shown = RichTable(title=self.title, title_justify="left", caption="\n".join(self.notes), caption_justify="left")
        for place, column in enumerate(self.columns):
            shown.add_column(column, justify="right" if place else "left", no_wrap=not place)
        for row in self.rows:
            shown.add_row(*row)
        console.print(shown)

    def markdown(self) -> str:
        rule = ("---", *("---:" for _ in self.columns[1:]))
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, "", *(f"- {note}" for note in self.notes)]).rstrip() + "\n"
