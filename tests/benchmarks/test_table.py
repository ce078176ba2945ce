import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from benchmarks.harness.benchmark import Benchmark, describe, machine, option
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
    known = machine()

    assert known["cores"] >= 1 and known["torch"].startswith("2.")
    assert known["date"] in describe(known) and known["torch"] in describe(known)


def test_percentiles_lie_between_their_neighbours() -> None:
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile([0.0, 10.0], 95) == pytest.approx(9.5)
    assert percentile([7.0], 95) == 7.0


@dataclass
class Sample(Benchmark):
    repeats: int = option(30, "kills", quick=2)
    sizes: tuple[str, ...] = option((), "sizes", choices=("tiny", "1M"))
    fsdp2: bool = option(False, "shard")


def test_options_are_the_fields_of_a_benchmark() -> None:
    assert Sample.parse([]) == Sample(repeats=30)
    assert Sample.parse(["--quick"]) == Sample(quick=True, repeats=2)
    assert Sample.parse(["--quick", "--repeats", "5", "--fsdp2"]) == Sample(quick=True, repeats=5, fsdp2=True)
    assert Sample.parse(["--sizes", "1M", "tiny", "--patience", "0"]) == Sample(sizes=("1M", "tiny"), patience=0.0)
    with pytest.raises(SystemExit):
        Sample.parse(["--sizes", "2M"])
