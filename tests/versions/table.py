"""The table of docs/compatibility.md: what was tried, and how it went."""

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
        python: version.
        torch: version.
        lightning: version.
        example: how the README's example ended.
        tests: how the telling tests ended.
    """

    python: str
    torch: str
    lightning: str
    example: str = "fails"
    tests: str = "not run"

    def found(self, python: str, torch: str, lightning: str) -> Row:
        """With the versions that were installed."""
        return replace(self, python=python, torch=torch, lightning=lightning)

    def with_example(self, how: str) -> Row:
        """With the way in which the example has ended, `IDENTICAL` for bit for bit as without the kill."""
        return replace(self, example=how, tests="fail" if how == IDENTICAL else "not run")

    def with_tests(self, summary: str) -> Row:
        """With tests that passed.

        Args:
            summary: how many, in pytest's words.
        """
        return replace(self, tests=summary)

    @property
    def passed(self) -> bool:
        """Whether everything did."""
        return self.example == IDENTICAL and "passed" in self.tests

    @property
    def is_installed(self) -> bool:
        """Whether these versions could be installed."""
        return self.example != NOT_INSTALLED

    def __str__(self) -> str:
        return f"| {self.python} | {self.torch} | {self.lightning} | {self.example} | {self.tests} |"


def row(leg: Leg) -> Row:
    """A row without results."""
    return Row(leg.python, leg.pins["torch"], leg.pins["lightning"])


def rows_of(text: str) -> list[Row]:
    """The rows of the table in the text of a page."""
    lines = re.findall(r"^\|.*\|$", text.partition(HEADER)[2].split("\n\n")[0], re.MULTILINE)
    return [Row(*(cell.strip() for cell in line[1:-1].split("|"))) for line in lines]


def merged(before: Iterable[Row], now: Iterable[Row]) -> list[Row]:
    """The rows of before, but for those whose versions of torch were tried now, in order."""
    by_torch = {made.torch: made for made in (*before, *now)}
    return sorted(by_torch.values(), key=lambda made: numbers(made.torch))


def record(now: Iterable[Row], page: Path = PAGE) -> None:
    """Put results into the table of a page."""
    text = page.read_text()
    before = rows_of(text)
    old = "\n".join([HEADER, *map(str, before)])
    page.write_text(text.replace(old, "\n".join([HEADER, *map(str, merged(before, now))])))
