"""Whether two runs are identical: every step of every rank, the end, and the rows in the log files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_ckptless.testing.log_files import Row, read_logs
from lightning_ckptless.testing.traces import Line, Trace, read_traces

NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not the same in both runs.

    Args:
        where: rank and point of training, or log file and row.
        field: what differs there.
        expected: what the first run has.
        found: what the second run has.
        rank: of the trace it stands in; None for log files.
        step: optimizer steps done there, where that is known.
    """

    where: str
    field: str
    expected: str
    found: str
    rank: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a comparison has found.

    Args:
        differences: all of them, the earliest in training first.
        ranks: ranks compared.
        points: points compared: batches, validations, ends of epochs and of `fit`, of all ranks.
        repeated: lines about points that the second run came to more than once.
        rows: rows of log files compared.
    """

    differences: tuple[Difference, ...]
    ranks: int
    points: int
    repeated: int
    rows: int

    @property
    def identical(self) -> bool:
        """Whether nothing differs, and there was something to compare."""
        return not self.differences and self.points > 0

    @property
    def first(self) -> Difference | None:
        """The first difference in the order of training."""
        return self.differences[0] if self.differences else None

    def __str__(self) -> str:
        compared = f"{self.points} points on {self.ranks} ranks ({self.repeated} run again), {self.rows} log rows"
        if self.identical:
            return f"identical: {compared}"
        if self.first is None:
            return "nothing to compare: no rank has written a trace"
        return f"{len(self.differences)} differences in {compared}; the first: {self.first}"

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain data."""
        return {"identical": self.identical, "first": self.first and asdict(self.first), **asdict(self)}


def compare(expected: Path, found: Path) -> Verdict:
    """Compare two finished runs.

    Args:
        expected: folder of the run that is right: `trace/` with its traces, `logs/` with copies of its log files.
        found: folder of the other.
    """
    traces = compare_traces(expected / "trace", found / "trace")
    rows, differences = compare_logs(expected / "logs", found / "logs")
    return Verdict((*traces.differences, *differences), traces.ranks, traces.points, traces.repeated, rows)


# ---------------------------------------------------------------------- traces


def compare_traces(expected: Path, found: Path) -> Verdict:
    """Compare the traces of two runs.

    Where a point was come to more than once, the last time counts, and all times must agree: but for the step that was
    in flight when a peer was lost, whose sums over the ranks a device may have left unfinished without an error.

    Args:
        expected: folder with the traces of the run that is right.
        found: folder with those of the other.
    """
    right, other = read_traces(expected), read_traces(found)
    placed: list[tuple[int, int, Difference]] = []
    points = repeated = 0
    for rank in sorted(right | other):
        a, b = right.get(rank, Trace(rank)), other.get(rank, Trace(rank))
        points += len(a.attempts())
        repeated += len(b.lines) - len(b.attempts())
        placed += [(place, rank, difference) for place, difference in _compare_rank(a, b)]
    placed.sort(key=lambda entry: entry[:2])
    return Verdict(tuple(entry[2] for entry in placed), len(right | other), points, repeated, 0)


def _compare_rank(right: Trace, other: Trace) -> Iterator[tuple[int, Difference]]:
    """Differences of one rank, each with its place in the order of training."""
    expected, found = right.attempts(), other.attempts()
    order = {point: place for place, point in enumerate(expected)}
    for point, lines in expected.items():
        if point not in found:
            yield order[point], _whole_line(lines[-1], right.rank, missing=True)
    in_flight = other.last_of_generations()
    place = -1
    for point, lines in found.items():
        place = order.get(point, place)
        if point not in expected:
            yield place, _whole_line(lines[-1], other.rank, missing=False)
            continue
        for difference in _compare_facts(expected[point][-1], lines[-1], other.rank, "field"):
            yield place, difference
        for earlier in lines[:-1]:
            if earlier in in_flight:
                continue
            for difference in _compare_facts(lines[-1], earlier, other.rank, "first attempt"):
                yield place, difference


def _whole_line(line: Line, rank: int, *, missing: bool) -> Difference:
    there = f"one of generation {line.generation}"
    sides = (there, NOTHING) if missing else (NOTHING, there)
    return Difference(f"rank {rank}, {line.point}", "the record", *sides, rank, line.point.step)


def _compare_facts(expected: Line, found: Line, rank: int, attempt: str) -> Iterator[Difference]:
    again = "" if attempt == "field" else f" (in the attempt of generation {found.generation}, run again later)"
    for name in [*expected.facts, *(name for name in found.facts if name not in expected.facts)]:
        a, b = expected.facts.get(name, NOTHING), found.facts.get(name, NOTHING)
        if a != b:
            yield Difference(f"rank {rank}, {expected.point}{again}", name, a, b, rank, expected.point.step)


# ---------------------------------------------------------------------- log files


def compare_logs(expected: Path, found: Path) -> tuple[int, list[Difference]]:
    """Compare copies of log files, as `log_files.collect_logs` made them.

    Returns:
        The number of rows in the first, and the differences.
    """
    right, other = read_logs(expected), read_logs(found)
    differences = []
    for name in sorted(right | other):
        differences += list(_compare_rows(name, right.get(name, []), other.get(name, [])))
    return sum(len(rows) for rows in right.values()), differences


def _compare_rows(name: str, expected: list[Row], found: list[Row]) -> Iterator[Difference]:
    """Differences of one log file. Rows that only one side has are named, not those that they push along."""
    for row, (right, other) in _count_both(expected, found).items():
        if other != right:
            yield Difference(name, f"row {_show(row)}", _times(right), _times(other), step=_step(row))
            return
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a != b:
            yield Difference(name, f"row {i}", _show(a), _show(b), step=_step(a))
            return


def _count_both(expected: list[Row], found: list[Row]) -> dict[Row, tuple[int, int]]:
    counts: dict[Row, tuple[int, int]] = {}
    for row in expected:
        counts[row] = (counts.get(row, (0, 0))[0] + 1, 0)
    for row in found:
        right, other = counts.get(row, (0, 0))
        counts[row] = (right, other + 1)
    return counts


def _times(count: int) -> str:
    return {0: NOTHING, 1: "it once", 2: "it twice"}.get(count, f"it {count} times")


def _show(row: Row) -> str:
    return ", ".join(f"{name}={value}" for name, value in row)


def _step(row: Row) -> int | None:
    step = dict(row).get("step", "")
    return int(step) if step.isdigit() else None
