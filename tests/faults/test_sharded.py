"""Sharded models: what each rank holds is mirrored once, and a run with faults ends as the one that was left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_ckptless.testing.starters import Ladder
from tests.faults.conftest import Drill
from tests.faults.matrix import BASE, Cell, is_version

SHARDED = replace(BASE, mesh="2x1", clip=0.5)
"""FSDP2 over two ranks; sizes of the layers do not all divide by them."""
GRID = replace(BASE, mesh="2x2", devices=4, samples=48)
"""FSDP2 over two ranks, of layers that tensor parallelism divides over two more."""

CELLS = {
    "fsdp-rank=1-during=training_step": Cell("kill:rank=1:step=4", SHARDED, restored=("step 3",)),
    "fsdp-rank=0-during=validation": Cell(
        "kill:rank=0:step=3:at=validation", replace(SHARDED, val_interval=3), restored=("step 3 (before its tail)",)
    ),
    "fsdp-all-at_once": Cell("kill:rank=all:step=5:at=mirror", SHARDED),
    "2d-rank=3-then=0": Cell("kill:rank=3:step=3,kill:rank=0:step=9:at=backward", GRID, recoveries=2),
}


@pytest.mark.parametrize("name", CELLS)
def test_kill(name: str, drill: Drill) -> None:
    cell = CELLS[name]
    report = drill(cell, Ladder(max_restarts=5))
    assert report.problems == ()
    assert report.identical
    assert report.relaunches + report.in_place == len(report.recoveries) == cell.recoveries
    for recovery, expected in zip(report.recoveries, cell.restored, strict=False):
        assert is_version(recovery.version, expected)
