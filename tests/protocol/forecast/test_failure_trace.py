"""Failure traces are read with line numbers in their errors, and keep their rate, bursts and repairs."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.forecast.failure_model import Repair
from lightning_ckptless.protocol.forecast.failure_trace import FailureTrace, read_trace
from tests.protocol.forecast.jobs import DAY_S

REPAIR = Repair(7.0, 7.0)
LINES = (
    "start,node,kind,repair",
    "# a comment",
    "",
    "0,a,node,100",
    "0,b,node,200",
    "86400, c, process,",
    "172800,d,node,",
)


def test_a_trace_is_read_in_order_of_time() -> None:
    lines = read_trace(["5,b,process,", "1.5,a,node,30"], "t.csv")
    assert [(line.start_s, line.node, line.is_node, line.repair_s) for line in lines] == [
        (1.5, "a", True, 30.0),
        (5.0, "b", False, None),
    ]
    dates = read_trace(["2026-01-01T00:00:00,a,node,1", "2026-01-02,b,node"], "t.csv")
    assert dates[1].start_s - dates[0].start_s == DAY_S


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("soon,a,node,1", "start 'soon': expected a number of seconds"),
        ("2026-13-01,a,node,1", "expected seconds or a date"),
        ("1,a,rack,1", "kind 'rack': expected node or process"),
        ("1,,node,1", "the name of the node is missing"),
        ("1,a,node,long", "repair 'long': expected a number of seconds"),
        ("1,a,node,-1", "repair -1: expected seconds, at least 0"),
        ("1,a,node,inf", "expected a finite number"),
        ("1 a node 1", "expected start,node,kind,repair"),
    ],
)
def test_an_unreadable_line_is_named_by_its_number(line: str, message: str) -> None:
    with pytest.raises(OptionsError, match=r"t\.csv, line 4: ") as refused:
        read_trace([*LINES[:3], line], "t.csv")
    assert message in str(refused.value)


def test_a_trace_needs_two_failures() -> None:
    with pytest.raises(OptionsError, match="found 1 failures"):
        read_trace(LINES[:4], "t.csv")


def test_nodes_and_days_have_to_cover_the_trace() -> None:
    lines = read_trace(LINES, "t.csv")
    with pytest.raises(OptionsError, match="trace_nodes=3: the trace names 4 nodes"):
        FailureTrace.of(lines, 3, None, REPAIR)
    with pytest.raises(OptionsError, match="trace_days=1: the failures of the trace span 2 days"):
        FailureTrace.of(lines, None, 1.0, REPAIR)
    assert FailureTrace.of(lines, None, None, REPAIR).duration_s == pytest.approx(2 * DAY_S * 4 / 3)


@pytest.mark.parametrize("nodes", [3, 8, 20])
def test_the_rate_per_node_is_that_of_the_trace(nodes: int) -> None:
    trace = FailureTrace.of(read_trace(LINES, "t.csv"), 8, 10.0, REPAIR)
    generator = np.random.default_rng(4)
    drawn = [trace.draw(generator, nodes, 4, 1000 * DAY_S) for _ in range(20)]
    lost = sum(len(incident.nodes) for incidents in drawn for incident in incidents)
    assert lost / (20 * 1000 * nodes) == pytest.approx(3 / 80, rel=0.15)
    assert trace.node_losses_per_s(nodes) == pytest.approx(3 / 80 * nodes / DAY_S)


def test_simultaneous_failures_and_repairs_remain_as_recorded() -> None:
    trace = FailureTrace.of(read_trace(LINES, "t.csv"), 8, 10.0, REPAIR)
    incidents = trace.draw(np.random.default_rng(5), 8, 4, 10 * DAY_S)
    assert sorted(tuple(sorted(incident.repairs_s)) for incident in incidents) == [(), (7.0,), (100.0, 200.0)]
    (pair,) = (incident.nodes for incident in incidents if len(incident.nodes) == 2)
    assert (pair[1] - pair[0]) % 8 == 1
