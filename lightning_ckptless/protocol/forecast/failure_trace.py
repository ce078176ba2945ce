"""A recorded failure trace as a failure model.

A trace is a table with the columns `start,node,kind,repair`, separated by commas. `start` is in seconds, or a date such
as 2026-01-31T12:00:00. `kind` is `node`, or `process` if the node remained. `repair` is in seconds; if it is empty, a
duration is drawn from the repair distribution. Lines with the same start are one incident.

Every simulated job sees the whole trace from another point in time on, and with the nodes in another order that keeps
neighbours together. A job with fewer nodes than the trace sees the failures of as many nodes. A job with more sees
several copies of the trace, each shifted independently. So the rate per node and the bursts remain as recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil, isfinite

import numpy as np

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.forecast.failure_model import SECONDS_PER_DAY, Gaps, Incident, Repair

COLUMNS = ("start", "node", "kind", "repair")
_KINDS = ("node", "process")


@dataclass(frozen=True, slots=True)
class TraceLine:
    """One failure of a trace.

    Args:
        start_s: when it happened, in seconds.
        node: name of the node.
        is_node: whether the node was lost, not just a process.
        repair_s: duration of the repair, in seconds; None if it is not recorded.
    """

    start_s: float
    node: str
    is_node: bool
    repair_s: float | None


def read_trace(lines: Iterable[str], path: str) -> list[TraceLine]:
    """Read a trace.

    Args:
        lines: lines of the file; blank lines and lines that begin with `#` are skipped.
        path: path of the file, for messages.

    Raises:
        OptionsError: a line cannot be read, or there are none.
    """
    found = []
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.split(",")]
        if not line.strip() or line.startswith("#") or cells == list(COLUMNS):
            continue
        try:
            found.append(_line(cells))
        except ValueError as error:
            raise OptionsError(f"{path}, line {number}: {line.strip()!r}: {error}") from error
    if len(found) < 2:
        raise OptionsError(f"{path}: found {len(found)} failures, expected a trace with at least 2")
    return sorted(found, key=lambda line: line.start_s)


def _line(cells: Sequence[str]) -> TraceLine:
    if len(cells) not in {len(COLUMNS) - 1, len(COLUMNS)}:
        raise ValueError(f"expected {','.join(COLUMNS)}, e.g. '86400,node17,node,73440'")
    start, node, kind, repair = (*cells, "")[: len(COLUMNS)]
    if not node:
        raise ValueError("the name of the node is missing")
    if kind not in _KINDS:
        raise ValueError(f"kind {kind!r}: expected {' or '.join(_KINDS)}")
    repair_s = _number(repair, "repair") if repair else None
    if repair_s is not None and repair_s < 0:
        raise ValueError(f"repair {repair}: expected seconds, at least 0")
    return TraceLine(_start(start), node, kind == "node", repair_s)


def _start(text: str) -> float:
    if "-" not in text[1:]:
        return _number(text, "start")
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"start {text!r}: expected seconds or a date, e.g. 2026-01-31T12:00:00") from error
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError(f"{name} {text!r}: expected a number of seconds") from error
    if not isfinite(value):
        raise ValueError(f"{name} {text!r}: expected a finite number of seconds")
    return value


@dataclass(frozen=True, slots=True)
class FailureTrace:
    """The failures of a recorded cluster.

    Args:
        lines: failures in chronological order.
        nodes: nodes of the recorded cluster, including those without a failure.
        duration_s: recorded duration, in seconds.
        repair: duration of repairs that are not recorded.
    """

    lines: tuple[TraceLine, ...]
    nodes: int
    duration_s: float
    repair: Repair

    @classmethod
    def of(cls, lines: Sequence[TraceLine], nodes: int | None, days: float | None, repair: Repair) -> FailureTrace:
        """Make a model of the lines of a trace.

        Args:
            lines: failures in chronological order.
            nodes: nodes of the recorded cluster; None for those that failed at least once.
            days: recorded duration; None for the time from the first to the last failure.
            repair: duration of repairs that are not recorded.

        Raises:
            OptionsError: the lines name more nodes, or last longer, or have no duration.
        """
        named = len({line.node for line in lines})
        if nodes is not None and nodes < named:
            raise OptionsError(f"trace_nodes={nodes}: the trace names {named} nodes")
        span_s = lines[-1].start_s - lines[0].start_s
        # The gap that follows the last failure is as long as the others on average.
        duration_s = days * SECONDS_PER_DAY if days is not None else span_s * len(lines) / (len(lines) - 1)
        if duration_s <= 0 or duration_s < span_s:
            raise OptionsError(
                f"trace_days={duration_s / SECONDS_PER_DAY:g}: the failures of the trace span "
                f"{span_s / SECONDS_PER_DAY:g} days"
            )
        return cls(tuple(lines), nodes or named, duration_s, repair)

    @property
    def shape(self) -> float:
        """Weibull shape for the closed form, which knows a trace by its rate alone."""
        return 1.0

    @property
    def process_share(self) -> float:
        """Share of the failures that leave the node."""
        return sum(not line.is_node for line in self.lines) / len(self.lines)

    def gaps(self, nodes: int) -> Gaps:
        """The mean gap between the failures of a job on this many nodes."""
        return Gaps(self.duration_s * self.nodes / (len(self.lines) * nodes))

    def node_losses_per_s(self, nodes: int) -> float:
        """Nodes that the job loses per second."""
        return (1 - self.process_share) / self.gaps(nodes).mean_s

    def draw(self, generator: np.random.Generator, nodes: int, rack_nodes: int, horizon_s: float) -> list[Incident]:
        """Draw the incidents of one job; see the module docstring.

        Args:
            generator: source of randomness.
            nodes: nodes of the job.
            rack_nodes: not used, because the trace has its own neighbours.
            horizon_s: duration of the job, in seconds.
        """
        del rack_nodes
        order = {name: place for place, name in enumerate(sorted({line.node for line in self.lines}))}
        found: dict[tuple[float, int], list[tuple[int, float]]] = {}
        for copy in range(ceil(nodes / self.nodes)):
            shift_s = float(generator.uniform(0, self.duration_s))
            rotation = int(generator.integers(self.nodes))
            for line in self.lines:
                node = copy * self.nodes + (order[line.node] + rotation) % self.nodes
                if node >= nodes:
                    continue
                repair_s = line.repair_s if line.repair_s is not None else float(self.repair.draw(generator, 1)[0])
                at_s = (line.start_s - self.lines[0].start_s + shift_s) % self.duration_s
                while at_s < horizon_s:
                    lost = found.setdefault((at_s, copy), [])
                    lost += [(node, repair_s)] if line.is_node else []
                    at_s += self.duration_s
        return [
            Incident(at_s, tuple(node for node, _ in lost), tuple(repair_s for _, repair_s in lost))
            for (at_s, _), lost in sorted(found.items(), key=lambda item: item[0])
        ]
