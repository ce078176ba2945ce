"""The tables of a soak test: faults, outcomes and recovery times."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.quantiles import quantile
from benchmarks.soak.evidence import RUNGS, Recovered
from benchmarks.soak.results import Result
from benchmarks.tables import Table

NUMBERS = re.compile(r"\d+(?:, \d+)*(?: and \d+)?")


def tables(results: Sequence[Result]) -> list[Table]:
    """Return all tables of the results."""
    return [totals(results), faults_table(results), recovery_table(results), rung_table(results)]


def totals(results: Sequence[Result]) -> Table:
    """Return the table of totals and failures."""
    table = Table("Soak test", ("", "count"))
    outcomes = Counter(result.outcome for result in results)
    seeds = [result.seed for result in results]
    table.add("runs", len(results))
    table.add("runs with loaded cores", sum(result.load for result in results))
    table.add("faults injected", sum(len(result.struck) for result in results))
    table.add("recoveries", sum(len(result.recoveries) for result in results))
    table.add("committed steps lost", sum(result.lost_steps for result in results))
    table.add("hangs", outcomes["hang"])
    table.add("runs that ended", outcomes["ended"])
    table.add("runs not identical", outcomes["different"])
    table.add("recoveries beyond their bound", outcomes["late"])
    table.add("leaks", sum(len(result.leaks) for result in results))
    if seeds:
        table.note(f"Seeds {_ranges(seeds)}.")
    bad = [result for result in results if not result.good]
    for result in bad:
        table.note(f"Seed {result.seed}: {result.outcome}.")
    return table


def faults_table(results: Sequence[Result]) -> Table:
    """Return the table of planned and injected faults by kind, with their moments."""
    table = Table("Faults by kind", ("kind", "planned", "injected", "moments"))
    asked = Counter(kind_of(fault) for result in results for fault in result.asked)
    struck = Counter(kind_of(fault) for result in results for fault in result.struck)
    moments: dict[str, set[str]] = {}
    for result in results:
        for fault in result.struck:
            moments.setdefault(kind_of(fault), set()).add(moment_of(fault))
    for kind, count in sorted(asked.items()):
        table.add(kind, count, struck[kind], ", ".join(sorted(moments.get(kind, ()))))
    return table


def recovery_table(results: Sequence[Result]) -> Table:
    """Return the table of recovery times, by kind of fault and of recovery."""
    heads = ("fault", "recovery", "count", "p50 s", "p95 s", "max s")
    table = Table("From a fault to the end of the first step of all ranks", heads)
    groups: dict[tuple[str, str], list[Recovered]] = {}
    for result in results:
        for one in result.recoveries:
            groups.setdefault((one.kind, one.rung), []).append(one)
    for (kind, rung), found in sorted(groups.items(), key=lambda group: (RUNGS.index(group[0][1]), group[0][0])):
        times = [one.total_s for one in found]
        table.add(kind, rung, len(found), *(f"{quantile(times, part):.2f}" for part in (0.5, 0.95, 1.0)))
    return table


def rung_table(results: Sequence[Result]) -> Table:
    """Return the table of the kinds of recovery and their reasons."""
    table = Table("Kinds of recovery", ("recovery", "reason", "count"))
    found = Counter((one.rung, NUMBERS.sub("N", one.reason)[:120]) for result in results for one in result.recoveries)
    for (rung, why), count in sorted(found.items(), key=lambda entry: (RUNGS.index(entry[0][0]), -entry[1])):
        table.add(rung, why or "not reported", count)
    return table


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
