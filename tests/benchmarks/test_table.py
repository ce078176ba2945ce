import io

import pytest
from rich.console import Console

from benchmarks.harness.machine import describe, facts
from benchmarks.harness.table import Column, Table, percentile, verdict


def table() -> Table:
    rows = [{"what": "this", "s": 1.5}, {"what": "that", "s": None}]
    return Table.of(
        "Times", rows, Column("what", "what"), Column("s", lambda row: row["s"], ".2f"), notes=["A sentence."]
    )


def test_a_table_as_markdown() -> None:
    assert table().markdown() == (
        "**Times**\n\n| what | s |\n| --- | ---: |\n| this | 1.50 |\n| that |  |\n\n- A sentence.\n"
    )


def test_a_table_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    table().show(console)

    assert all(text in console.file.getvalue() for text in ("Times", "this", "1.5", "A sentence."))  # type: ignore[attr-defined]


def test_a_verdict_names_both_numbers() -> None:
    assert verdict(1.5, 1.5, "ms") == "1.50 ms (target 1.5 ms): met"
    assert verdict(1.6, 1.5, "ms") == "1.60 ms (target 1.5 ms): missed"


def test_the_machine_is_described() -> None:
    known = facts()

    assert known["cores"] >= 1 and known["torch"].startswith("2.")
    assert known["date"] in describe(known) and known["torch"] in describe(known)


def test_percentiles_lie_between_their_neighbours() -> None:
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile([0.0, 10.0], 95) == pytest.approx(9.5)
    assert percentile([7.0], 95) == 7.0
