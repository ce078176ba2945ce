"""Reads traces: the points that each rank reached, in order, including repeated ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FILE = re.compile(r"trace-rank(\d+)\.jsonl")


@dataclass(frozen=True, order=True, slots=True)
class Point:
    """The point in training at which a line was written. Several lines of a point are repeated attempts.

    Args:
        fit: fit index.
        kind: `batch`, `validation`, `epoch` or `end`.
        epoch: number of the epoch, from 0.
        step: number of finished optimizer steps.
        batch: index of the batch in the epoch; -1 for other kinds.
    """

    fit: int
    kind: str
    epoch: int
    step: int
    batch: int = -1

    def __str__(self) -> str:
        where = {
            "batch": f"batch {self.batch} of epoch {self.epoch}",
            "validation": f"validation in epoch {self.epoch}",
        }
        what = where.get(self.kind, f"end of epoch {self.epoch}" if self.kind == "epoch" else "end of fit")
        return f"step {self.step}, {what}" + (f", fit {self.fit}" if self.fit else "")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a trace.

    Args:
        point: point in training.
        generation: generation that wrote it.
        at: wall clock in seconds since the epoch.
        facts: values that must be equal in two runs, by name.
    """

    point: Point
    generation: int
    at: float
    facts: dict[str, str]


@dataclass(slots=True)
class Trace:
    """The trace of one rank.

    Args:
        rank: rank that wrote it.
        lines: lines in the order of writing, including replayed steps.
        loggers: kind and folder of each logger, for each generation.
        torn_lines: number of lines that a dying process left incomplete.
    """

    rank: int
    lines: list[Line] = field(default_factory=list)
    loggers: list[tuple[str, Path | None]] = field(default_factory=list)
    torn_lines: int = 0

    def attempts(self) -> dict[Point, list[Line]]:
        """Return the lines of each point, in the order in which the points were first reached."""
        found: dict[Point, list[Line]] = {}
        for line in self.lines:
            found.setdefault(line.point, []).append(line)
        return found

    def last_of_generations(self) -> list[Line]:
        """Return the last line of each generation."""
        return list({line.generation: line for line in self.lines}.values())


def read_traces(folder: Path) -> dict[int, Trace]:
    """Read the traces in a folder, by rank."""
    found = {}
    for path in folder.glob("trace-rank*.jsonl"):
        if match := _FILE.fullmatch(path.name):
            found[int(match[1])] = read_trace(path, int(match[1]))
    return dict(sorted(found.items()))


def read_trace(path: Path, rank: int) -> Trace:
    """Read one trace. Lines that are not valid JSON are counted and skipped."""
    trace = Trace(rank)
    for text in path.read_text().splitlines():
        try:
            row = json.loads(text)
        except ValueError:
            trace.torn_lines += 1
            continue
        if row["kind"] == "begin":
            trace.loggers += [(log["kind"], log["log_dir"] and Path(log["log_dir"])) for log in row["loggers"]]
        else:
            trace.lines.append(_line(row))
    return trace


def _line(row: dict[str, Any]) -> Line:
    point = Point(row["fit"], row["kind"], row["epoch"], row["step"], row.get("batch", -1))
    return Line(point, row["generation"], row["at"], dict(_facts(row)))


def _facts(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from row.get("digests", {}).items()
    yield from row.get("values", {}).items()
