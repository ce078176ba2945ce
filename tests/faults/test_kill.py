"""Every cell of the fault matrix: after real faults, the results match the undisturbed run bit for bit."""

from __future__ import annotations

import pytest

from lightning_ckptless.testing.drill import DrillReport
from lightning_ckptless.testing.starters import Ladder
from tests.faults.conftest import Drill
from tests.faults.matrix import CELLS, RELAUNCHED, Cell, is_version

IN_PLACE = Ladder(max_restarts=5)
LONG = (
    "rank=1-twice", "rank=0-then=1", "data=iterable", "data=workers", "plateau-early_stopping", "limited",
    "mirror_every=auto", "replica_per_rank-sent",
)  # fmt: skip
"""Cells that another cell, or `ten_in_a_row` in `test_in_place`, covers as well."""
RELAUNCH = Ladder(max_restarts=5, in_place=False)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in CELLS]
)
def test_kill(name: str, drill: Drill) -> None:
    cell = CELLS[name]
    report = drill(cell, IN_PLACE)
    if "rank=all" in cell.faults and report.relaunches:
        # If all ranks are lost at once, no survivor is left to recover in place.
        _assert_survived(cell, report, relaunches=cell.recoveries, in_place=0)
    else:
        # Two simultaneous deaths count as two faults if the second is detected after the first recovery has begun.
        _assert_survived(cell, report, in_place=cell.recoveries * (2 if "rank=all" in cell.faults else 1))


@pytest.mark.parametrize(
    "name",
    [name if place % 3 == 0 else pytest.param(name, marks=pytest.mark.long) for place, name in enumerate(RELAUNCHED)],
)
def test_kill_and_relaunch(name: str, drill: Drill) -> None:
    cell = CELLS[name]
    _assert_survived(cell, drill(cell, RELAUNCH), relaunches=cell.recoveries, in_place=0)


def _assert_survived(cell: Cell, report: DrillReport, *, relaunches: int = 0, in_place: int) -> None:
    assert report.problems == ()
    assert report.identical
    assert (report.relaunches, report.in_place) == (relaunches, in_place)
    assert len(report.recoveries) == cell.recoveries
    assert {recovery.rung for recovery in report.recoveries} == ({"in place"} if in_place else {"relaunch"})
    for recovery, expected in zip(report.recoveries, cell.restored, strict=False):
        assert is_version(recovery.version, expected)
    for recovery in report.recoveries:
        assert sum(recovery.phases.values()) == pytest.approx(recovery.total_s, abs=1e-5)
