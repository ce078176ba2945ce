"""Compares two runs: every step of every rank, the final state, and the rows of the log files."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lightning_ckptless.ledger import LEDGER_NAME, read_ledger
from lightning_ckptless.protocol.wording import counted
from lightning_ckptless.testing.log_files import Row, read_logs
from lightning_ckptless.testing.trace_reader import Line, Trace, read_traces

NOTHING = "nothing"
LOG_ROWS = "log rows"
RECORD = "record"


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference between two runs.

    Args:
        where: rank and point of training, or log file and row.
        field: name of the value that differs (a tensor, a generator, a logged value, a column); `log rows` for a
            missing or repeated row, `record` for a missing or unexpected point of training.
        expected: value in the first run.
        found: value in the second run.
        rank: rank of the trace; None for log files.
        step: number of finished optimizer steps; None if unknown.
        at: when the second run wrote it, in seconds since the epoch; None for log files and missing values.
    """

    where: str
    field: str
    expected: str
    found: str
    rank: int | None = None
    step: int | None = None
    at: float | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of a comparison.

    Args:
        differences: all differences, in the order of training.
        ranks: number of ranks compared.
        points: number of points compared: batches, validations, ends of epochs and of `fit`, of all ranks.
        repeated: number of lines for points that the second run reached again.
        rows: number of rows of log files compared.
        ignored: names of the values that matched a pattern and were not compared.
    """

    differences: tuple[Difference, ...]
    ranks: int
    points: int
    repeated: int
    rows: int
    ignored: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether there was something to compare, and nothing differs."""
        return not self.differences and self.points > 0

    @property
    def first(self) -> Difference | None:
        """The earliest difference in training."""
        return self.differences[0] if self.differences else None

    def by_field(self) -> dict[str, tuple[Difference, ...]]:
        """Return the differences by value, in the order of their first difference."""
        found: dict[str, list[Difference]] = {}
        for difference in self.differences:
            found.setdefault(difference.field, []).append(difference)
        return {field: tuple(differences) for field, differences in found.items()}

    def __str__(self) -> str:
        compared = f"{self.points} points on {self.ranks} ranks ({self.repeated} repeated), {self.rows} log rows"
        if self.identical:
            return f"identical: {compared}"
        if self.first is None:
            return "nothing to compare: no rank has written a trace"
        count = len(self.differences)
        return f"{counted(count, 'difference')} in {compared}; first: {self.first}"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, for JSON."""
        return {"identical": self.identical, "first": self.first and asdict(self.first), **asdict(self)}


class Ignore:
    """The values to exclude from a comparison.

    Args:
        patterns: shell-style patterns for the names of values, e.g. `callback * (Speed)` or `*_s`.

    Attributes:
        names: names of the values excluded so far.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self.patterns = tuple(patterns)
        self.names: set[str] = set()

    def __contains__(self, name: str) -> bool:
        if any(fnmatchcase(name, pattern) for pattern in self.patterns):
            self.names.add(name)
            return True
        return False


def compare(expected: Path, found: Path, ignore: Sequence[str] = ()) -> Comparison:
    """Compare two finished runs.

    Args:
        expected: folder of the reference run: `trace/` with its traces, `logs/` with copies of its log files, `runs/`
            with its ledger.
        found: folder of the other run.
        ignore: patterns for the names of values that may differ.
    """
    ignored = Ignore(ignore)
    traces = compare_traces(expected / "trace", found / "trace", ignored, discarded_steps(found / "runs"))
    rows, differences = compare_logs(expected / "logs", found / "logs", ignored)
    names = tuple(sorted(ignored.names))
    return Comparison((*traces.differences, *differences), traces.ranks, traces.points, traces.repeated, rows, names)


# ---------------------------------------------------------------------- traces


def discarded_steps(runs: Path) -> dict[int, int]:
    """Return the last step of each generation whose later steps were discarded because replicas differed.

    Args:
        runs: folder of the run's folder, which has the ledger.
    """
    events = [event for path in runs.glob(f"*/{LEDGER_NAME}") for event in read_ledger(path, only="divergence")]
    ended = [event for event in events if event.fields["consequence"] in ("go_back", "replace")]
    return {event.generation or 0: event.fields["committed"] for event in ended}


def compare_traces(
    expected: Path, found: Path, ignore: Ignore | None = None, discarded: Mapping[int, int] | None = None
) -> Comparison:
    """Compare the traces of two runs.

    If a point was reached more than once, the last attempt is compared, and all attempts must agree. The exceptions are
    the step in flight when a peer was lost, since a device may have ended its collectives incomplete but without an
    error, and steps that were discarded because replicas differed.

    Args:
        expected: folder with the traces of the reference run.
        found: folder with the traces of the other run.
        ignore: values that may differ.
        discarded: the last step that counts, for each generation of the other run that it has discarded in part.
    """
    right, other = read_traces(expected), read_traces(found)
    ignore = ignore or Ignore()
    placed: list[tuple[int, int, Difference]] = []
    points = repeated = 0
    for rank in sorted(right | other):
        a, b = right.get(rank, Trace(rank)), other.get(rank, Trace(rank))
        points += len(a.attempts())
        repeated += len(b.lines) - len(b.attempts())
        placed += [(place, rank, difference) for place, difference in _compare_rank(a, b, ignore, discarded or {})]
    placed.sort(key=lambda entry: entry[:2])
    return Comparison(tuple(entry[2] for entry in placed), len(right | other), points, repeated, 0)


def _compare_rank(
    right: Trace, other: Trace, ignore: Ignore, discarded: Mapping[int, int]
) -> Iterator[tuple[int, Difference]]:
    """Yield the differences of one rank, each with its position in the order of training."""
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
        for difference in _compare_facts(expected[point][-1], lines[-1], other.rank, ignore):
            yield place, difference
        for earlier in lines[:-1]:
            if earlier in in_flight or earlier.point.step > discarded.get(earlier.generation, sys.maxsize):
                continue
            for difference in _compare_facts(lines[-1], earlier, other.rank, ignore, repeated_later=True):
                yield place, difference


def _whole_line(line: Line, rank: int, *, missing: bool) -> Difference:
    present = f"one from generation {line.generation}"
    sides = (present, NOTHING) if missing else (NOTHING, present)
    return Difference(f"rank {rank}, {line.point}", RECORD, *sides, rank, line.point.step, None if missing else line.at)


def _compare_facts(
    expected: Line, found: Line, rank: int, ignore: Ignore, *, repeated_later: bool = False
) -> Iterator[Difference]:
    again = f" (attempt of generation {found.generation}, repeated later)" if repeated_later else ""
    for name in [*expected.facts, *(name for name in found.facts if name not in expected.facts)]:
        if name in ignore:
            continue
        a, b = expected.facts.get(name, NOTHING), found.facts.get(name, NOTHING)
        if a != b:
            where = f"rank {rank}, {expected.point}{again}"
            yield Difference(where, name, a, b, rank, expected.point.step, found.at)


# ---------------------------------------------------------------------- log files


def compare_logs(expected: Path, found: Path, ignore: Ignore | None = None) -> tuple[int, list[Difference]]:
    """Compare copies of log files made by `log_files.collect_logs`.

    Args:
        expected: folder with the copies of the reference run.
        found: folder with the copies of the other run.
        ignore: columns that may differ.

    Returns:
        The number of rows in the first, and the differences.
    """
    ignore = ignore or Ignore()
    right, other = ({name: _without(rows, ignore) for name, rows in read_logs(at).items()} for at in (expected, found))
    differences: list[Difference] = []
    for name in sorted(right | other):
        differences += _compare_rows(name, right.get(name, []), other.get(name, []))
    return sum(len(rows) for rows in right.values()), differences


def _without(rows: Sequence[Row], ignore: Ignore) -> list[Row]:
    """Remove the ignored columns, and rows with only the step left."""
    kept = []
    for row in rows:
        cells = tuple(cell for cell in row if cell[0] not in ignore)
        if len(cells) == len(row) or {name for name, _ in cells} - {"step", "epoch"}:
            kept.append(cells)
    return kept


def _compare_rows(name: str, expected: Sequence[Row], found: Sequence[Row]) -> Iterator[Difference]:
    """Yield the differences of one log file: different cells, missing, repeated or unexpected rows, wrong order."""
    missing, extra = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    right, other = Counter(expected), Counter(found)
    if not missing and not extra:
        yield from _out_of_order(name, expected, found)
    for row in list(missing.elements()):
        counterpart = next((candidate for candidate in extra if _key(candidate) == _key(row)), None)
        if counterpart is not None:
            missing -= Counter([row])
            extra -= Counter([counterpart])
            yield from _compare_cells(name, row, counterpart)
    for row in dict.fromkeys((*missing, *extra)):
        yield Difference(f"{name}, row {_show(row)}", LOG_ROWS, _times(right[row]), _times(other[row]), step=_step(row))


def _key(row: Row) -> tuple[Any, ...]:
    """Return a key that is equal for rows with the same step and the same columns."""
    return _step(row), tuple(name for name, _ in row)


def _compare_cells(name: str, right: Row, other: Row) -> Iterator[Difference]:
    at = "" if (step := _step(right)) is None else f", row of step {step}"
    for (column, a), (_, b) in zip(right, other, strict=True):
        if a != b:
            yield Difference(f"{name}{at}", column, a, b, step=step)


def _out_of_order(name: str, expected: Sequence[Row], found: Sequence[Row]) -> Iterator[Difference]:
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a != b:
            yield Difference(f"{name}, row {number}", LOG_ROWS, _show(a), _show(b), step=_step(a))
            return


def _times(count: int) -> str:
    return {0: NOTHING, 1: "once", 2: "twice"}.get(count, f"{count} times")


def _show(row: Row) -> str:
    return ", ".join(f"{name}={value}" for name, value in row)


def _step(row: Row) -> int | None:
    step = dict(row).get("step", "")
    return int(step) if step.isdigit() else None
