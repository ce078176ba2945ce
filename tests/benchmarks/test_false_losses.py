"""The benchmark of false losses: its table, and one round of it."""

from __future__ import annotations

from argparse import Namespace

import pytest

from benchmarks.false_losses import NODES, PROGRAM, tables
from benchmarks.harness.report import Results, Steps, progress_bar


def test_false_losses_are_counted_with_their_reasons() -> None:
    rounds = [
        {"node": 0, "closed": 1, "reasons": [], "late_s": 0.1},
        {"node": 1, "closed": 2, "reasons": ["node 0 of the round has been silent"], "late_s": 1.25},
    ]
    (table,) = tables(Namespace(repeats=1, seconds=10), {"rounds": rounds, "loops": 4})
    assert table.rows == [("4 busy loops", "2", "3", "1", "1.25")]
    assert table.notes == ["node 0 of the round has been silent"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_no_agent_is_considered_lost_while_all_cores_are_busy() -> None:
    """Two rounds, in each of which all connections between the agents are closed once while the agents live on."""
    args, found = PROGRAM.parse(["--repeats", "1", "--seconds", "20"]), Results()
    with progress_bar() as progress:
        PROGRAM.measure(args, found, Steps(progress))
    assert len(found["rounds"]) == 2 * NODES
    assert sum(row["closed"] for row in found["rounds"]) >= 2 * NODES
    assert [row["reasons"] for row in found["rounds"]] == [[]] * 2 * NODES
