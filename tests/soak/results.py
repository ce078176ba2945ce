"""Results of runs, one JSON line each, so that an interrupted soak test continues with the missing seeds; tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.harness.table import Column, Table, p95
from tests.soak.judge import RUNGS, Recovered, Result


def append(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def read(path: Path) -> list[Result]:
    """Return the results in a file, the last one of each seed; an incomplete line is left out."""
    found: dict[int, Result] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            fields = json.loads(line)
            fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            fields["recoveries"] = tuple(Recovered(*one) for one in fields["recoveries"])
            found[fields["seed"]] = Result(**fields)
    return list(found.values())


def totals(results: Sequence[Result]) -> Table:
    """Return the table of totals and failures."""
    outcomes = Counter(result.outcome for result in results)
    counts = {
        "runs": len(results),
        "runs with loaded cores": sum(result.load for result in results),
        "faults injected": sum(len(result.struck) for result in results),
        "recoveries": sum(len(result.recoveries) for result in results),
        "committed steps lost": sum(result.lost_steps for result in results),
        "hangs": outcomes["hang"],
        "runs that ended": outcomes["ended"],
        "runs not identical": outcomes["different"],
        "recoveries beyond their bound": outcomes["late"],
        "leaks": sum(len(result.leaks) for result in results),
    }
    notes = [f"Seeds {_ranges(result.seed for result in results)}."] if results else []
    notes += [f"Seed {result.seed}: {result.outcome}." for result in results if not result.good]
    return Table.of("Soak test", counts.items(), Column("", 0), Column("count", 1), notes=notes)


def recovery_table(results: Sequence[Result]) -> Table:
    """Return the table of recovery times, by kind of fault and of recovery."""
    times: dict[tuple[str, str], list[float]] = {}
    for result in results:
        for one in result.recoveries:
            times.setdefault((one.kind, one.rung), []).append(one.total_s)
    return Table.of(
        "From a fault to the end of the first step of all ranks",
        sorted(((*group, found) for group, found in times.items()), key=lambda row: (RUNGS.index(row[1]), row[0])),
        Column("fault", 0), Column("recovery", 1), Column("count", lambda row: len(row[2])),
        Column("p50 s", 2, ".2f", median), Column("p95 s", 2, ".2f", p95), Column("max s", 2, ".2f", max),
    )  # fmt: skip


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers as text with ranges, such as `1 to 4, 7`."""
    groups: list[list[int]] = []
    for number in sorted(numbers):
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups)
