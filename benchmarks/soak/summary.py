"""The tables of a soak test: faults, outcomes and recovery times."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from benchmarks.harness.table import Column, Table, p95
from benchmarks.soak.evidence import RUNGS
from benchmarks.soak.results import Result

NUMBERS = re.compile(r"\d+(?:, \d+)*(?: and \d+)?")


def tables(results: Sequence[Result]) -> list[Table]:
    """Return all tables of the results."""
    return [totals(results), faults_table(results), recovery_table(results), rung_table(results)]


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


def faults_table(results: Sequence[Result]) -> Table:
    """Return the table of planned and injected faults by kind, with their moments."""
    asked = Counter(kind_of(fault) for result in results for fault in result.asked)
    struck = Counter(kind_of(fault) for result in results for fault in result.struck)
    moments: dict[str, set[str]] = {}
    for result in results:
        for fault in result.struck:
            moments.setdefault(kind_of(fault), set()).add(moment_of(fault))
    return Table.of(
        "Faults by kind",
        sorted(asked.items()),
        Column("kind", 0),
        Column("planned", 1),
        Column("injected", lambda row: struck[row[0]]),
        Column("moments", lambda row: ", ".join(sorted(moments.get(row[0], ())))),
    )


def recovery_table(results: Sequence[Result]) -> Table:
    """Return the table of recovery times, by kind of fault and of recovery."""
    times: dict[tuple[str, str], list[float]] = {}
    for result in results:
        for one in result.recoveries:
            times.setdefault((one.rung, one.kind), []).append(one.total_s)
    return Table.of(
        "From a fault to the end of the first step of all ranks",
        sorted(((*group, found) for group, found in times.items()), key=lambda row: (RUNGS.index(row[0]), row[1])),
        Column("fault", 1),
        Column("recovery", 0),
        Column("count", lambda row: len(row[2])),
        Column("p50 s", 2, ".2f", median),
        Column("p95 s", 2, ".2f", p95),
        Column("max s", 2, ".2f", max),
    )


def rung_table(results: Sequence[Result]) -> Table:
    """Return the table of the kinds of recovery and their reasons."""
    found = Counter((one.rung, NUMBERS.sub("N", one.reason)[:120]) for result in results for one in result.recoveries)
    return Table.of(
        "Kinds of recovery",
        sorted(((*kind, count) for kind, count in found.items()), key=lambda row: (RUNGS.index(row[0]), -row[2])),
        Column("recovery", 0),
        Column("reason", lambda row: row[1] or "not reported"),
        Column("count", 2),
    )


def kind_of(fault: str) -> str:
    """Return the kind of a fault, in words."""
    return fault.split(":", maxsplit=1)[0]


def moment_of(fault: str) -> str:
    """Return the moment of a fault in words: the point in which it occurred, or the phase that it followed."""
    if found := re.search(r":at=(\w+)", fault):
        return found[1]
    if found := re.search(r":after=(\w+)", fault):
        return f"after {found[1]}"
    return "any time" if fault.startswith("outside") else "training_step"


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers as text with ranges, such as `1 to 4, 7`."""
    groups: list[list[int]] = []
    for number in sorted(numbers):
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups)
