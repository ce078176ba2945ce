"""Sharded models: every shard is mirrored once, and runs with faults match the undisturbed run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_ckptless.testing.drill import DrillReport
from lightning_ckptless.testing.starters import Ladder
from tests.faults.conftest import Drill
from tests.faults.matrix import BASE, Cell, is_version

SHARDED = replace(BASE, mesh="2x1", clip=0.5)
"""FSDP2 over two ranks; not all layer sizes are divisible by two."""
GRID = replace(BASE, mesh="2x2", devices=4, epochs=1)
"""FSDP2 over two ranks, combined with tensor parallelism over two."""
HYBRID = replace(GRID, sharding="hybrid")
"""Hybrid sharding: FSDP2 over two ranks, replicated twice."""
PARTLY = replace(SHARDED, sharding="partly", accumulate=2, optimization="sgd", clip=None)
"""A frozen weight, a weight that two layers share, activation checkpointing, and a head that is not sharded and differs
between ranks; SGD has no state tensor that would reveal it."""

CELLS = {
    "fsdp-rank=0-during=validation": Cell(
        "kill:rank=0:step=3:at=validation", replace(SHARDED, val_interval=3), restored=("step 3 (before validation)",)
    ),
    "fsdp-rank=1-during=backward-then=0-during=optimizer_step": Cell(
        "kill:rank=1:step=4:at=backward,kill:rank=0:step=8:at=optimizer_step", SHARDED, recoveries=2
    ),
    "fsdp-ten_in_a_row": Cell(
        ",".join(f"kill:rank={step % 2}:step={step}" for step in range(2, 12)), SHARDED, recoveries=10
    ),
    "partly-rank=0-during=accumulation": Cell("kill:rank=0:step=3:at=accumulation", PARTLY, restored=("step 2",)),
    "compiled-rank=1-during=backward": Cell("kill:rank=1:step=4:at=backward", replace(SHARDED, sharding="compiled")),
    "tp-rank=1-during=optimizer_step": Cell(
        "kill:rank=1:step=4:at=optimizer_step", replace(BASE, mesh="1x2"), restored=("step 3",)
    ),
    "hybrid-rank=2-during=mirror": Cell("kill:rank=2:step=4:at=mirror", HYBRID),
    # Each holder has some of the pieces that it keeps, and is sent the others.
    "hybrid-replica_per_rank": Cell(
        "kill:rank=2:step=4", replace(HYBRID, strategy_options="{'failure_domain': 'rank'}"), restored=("step 3",)
    ),
    "2d-rank=3-then=0": Cell("kill:rank=3:step=2,kill:rank=0:step=5:at=backward", GRID, recoveries=2),
}
LONG = ("hybrid-replica_per_rank", "compiled-rank=1-during=backward", "fsdp-ten_in_a_row")
RELAUNCHED = ("fsdp-rank=0-during=validation", "hybrid-rank=2-during=mirror")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in CELLS]
)
def test_kill(name: str, drill: Drill) -> None:
    _assert_survived(CELLS[name], drill(CELLS[name], Ladder(max_restarts=20)), in_place=True)


@pytest.mark.long
@pytest.mark.parametrize("name", RELAUNCHED)
def test_kill_and_relaunch(name: str, drill: Drill) -> None:
    _assert_survived(CELLS[name], drill(CELLS[name], Ladder(max_restarts=5, in_place=False)), in_place=False)


def _assert_survived(cell: Cell, report: DrillReport, *, in_place: bool) -> None:
    assert report.problems == ()
    assert report.identical
    counts = (report.in_place, report.relaunches) if in_place else (report.relaunches, report.in_place)
    assert counts == (cell.recoveries, 0)
    assert {recovery.rung for recovery in report.recoveries} == {"in place" if in_place else "relaunch"}
    for recovery, expected in zip(report.recoveries, cell.restored, strict=False):
        assert is_version(recovery.version, expected)
