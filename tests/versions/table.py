"""The table in docs/compatibility.md: tested combinations and their results."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.versions.legs import REPOSITORY, Leg, numbers

PAGE = REPOSITORY / "docs" / "compatibility.md"
IDENTICAL, NOT_INSTALLED = "identical", "cannot be installed here"
HEADER = """\
| Python | torch | Lightning | README's example, with a kill | Tests |
|---|---|---|---|---|"""


@dataclass(frozen=True)
class Row:
    """One combination of versions and its results.

    Args:
        python: version of Python.
        torch: version of torch.
        lightning: version of Lightning.
        example: result of the README's example.
        tests: result of the selected tests.
    """

    python: str
    torch: str
    lightning: str
    example: str = "fails"
    tests: str = "not run"

    def found(self, python: str, torch: str, lightning: str) -> Row:
        """Return the row with the installed versions."""
        return replace(self, python=python, torch=torch, lightning=lightning)

    def with_example(self, result: str) -> Row:
        """Return the row with the result of the example; `IDENTICAL` means bit for bit as without the kill."""
        return replace(self, example=result, tests="fail" if result == IDENTICAL else "not run")

    def with_tests(self, summary: str) -> Row:
        """Return the row with passed tests.

        Args:
            summary: pytest's counts.
        """
        return replace(self, tests=summary)

    @property
    def passed(self) -> bool:
        """Whether the example and the tests passed."""
        return self.example == IDENTICAL and "passed" in self.tests

    @property
    def is_installed(self) -> bool:
        """Whether these versions could be installed."""
        return self.example != NOT_INSTALLED

    def __str__(self) -> str:
        return f"| {self.python} | {self.torch} | {self.lightning} | {self.example} | {self.tests} |"


def row(leg: Leg) -> Row:
    """Return a row without results."""
    return Row(leg.python, leg.pins["torch"], leg.pins["lightning"])


def rows_of(text: str) -> list[Row]:
    """Return the rows of the table in the text of a page."""
    lines = re.findall(r"^\|.*\|$", text.partition(HEADER)[2].split("\n\n")[0], re.MULTILINE)
    return [Row(*(cell.strip() for cell in line[1:-1].split("|"))) for line in lines]


def merged(before: Iterable[Row], now: Iterable[Row]) -> list[Row]:
    """Merge new rows into old ones; a new row replaces the old one with the same version of torch."""
    by_torch = {made.torch: made for made in (*before, *now)}
    return sorted(by_torch.values(), key=lambda made: numbers(made.torch))


def record(now: Iterable[Row], page: Path = PAGE) -> None:
    """Record results in the table of a page."""
    text = page.read_text()
    before = rows_of(text)
    old = "\n".join([HEADER, *map(str, before)])
    page.write_text(text.replace(old, "\n".join([HEADER, *map(str, merged(before, now))])))
