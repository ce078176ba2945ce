"""A table, shown on a terminal or written as Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        title: title of the table.
        columns: column headings; all but the first are right-aligned.
        rows: one cell per column.
        notes: sentences below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Add a row."""
        assert len(cells) == len(self.columns), f"{self.title}: {len(cells)} cells for {len(self.columns)} columns"
        self.rows.append(tuple(str(cell) for cell in cells))

    def note(self, sentence: str) -> None:
        """Add a sentence below the table."""
        self.notes.append(sentence)

    def show(self, console: Console) -> None:
        """Print the table."""
        shown = RichTable(title=self.title, title_justify="left", caption="\n".join(self.notes), caption_justify="left")
        for place, column in enumerate(self.columns):
            shown.add_column(column, justify="right" if place else "left", no_wrap=not place)
        for row in self.rows:
            shown.add_row(*row)
        console.print(shown)

    def markdown(self) -> str:
        """Return the table with its title and notes, as Markdown."""
        lines = [
            f"**{self.title}**",
            "",
            _line(self.columns),
            _line(("---", *("---:" for _ in self.columns[1:]))),
            *map(_line, self.rows),
            "",
            *(f"- {note}" for note in self.notes),
        ]
        return "\n".join(lines).rstrip() + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def verdict(measured: float, target: float, unit: str) -> str:
    """Compare a measured value with a target that it should not exceed, in words."""
    word = "met" if measured <= target else "missed"
    return f"{measured:.2f} {unit} (target {target:g} {unit}): {word}"
