"""Traces as they are read: what each rank did, in order, and what it did twice."""

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
    """Where in a run a line was written. Lines of the same point are attempts at the same thing.

    Args:
        fit: how many times `fit` was entered before in the same program.
        kind: `batch`, `validation`, `epoch` or `end`.
        epoch: number of the epoch, from 0.
        step: optimizer steps done.
        batch: index of the batch in the epoch; -1 where there is none.
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
        point: where in the run.
        generation: number of the membership that wrote it.
        at: wall clock, seconds since the epoch.
        facts: what must be equal in two runs, by name.
    """

    point: Point
    generation: int
    at: float
    facts: dict[str, str]


@dataclass(slots=True)
class Trace:
    """What one rank has written.

    Args:
        rank: who wrote it.
        lines: in the order of writing, steps that were run again included.
        loggers: kind and folder of each logger, as each generation named them.
        torn_lines: lines that a dying process left unfinished.
    """

    rank: int
    lines: list[Line] = field(default_factory=list)
    loggers: list[tuple[str, Path | None]] = field(default_factory=list)
    torn_lines: int = 0

    def attempts(self) -> dict[Point, list[Line]]:
        """The lines of each point, in the order in which they were first reached."""
        found: dict[Point, list[Line]] = {}
        for line in self.lines:
            found.setdefault(line.point, []).append(line)
        return found

    def last_of_generations(self) -> list[Line]:
        """The line that each generation wrote last."""
        return list({line.generation: line for line in self.lines}.values())


def read_traces(folder: Path) -> dict[int, Trace]:
    """The traces in a folder, by rank."""
    found = {}
    for path in folder.glob("trace-rank*.jsonl"):
        if match := _FILE.fullmatch(path.name):
            found[int(match[1])] = read_trace(path, int(match[1]))
    return dict(sorted(found.items()))


def read_trace(path: Path, rank: int) -> Trace:
    """One trace. A line that is no JSON is counted and left out."""
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
