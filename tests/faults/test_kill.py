"""Every cell of the matrix: a real fault, and a run that ends bit for bit as if it had not happened."""

from __future__ import annotations

import pytest

from tests.faults.conftest import Drill
from tests.faults.matrix import CELLS, is_version


@pytest.mark.parametrize("name", CELLS)
def test_kill(name: str, drill: Drill) -> None:
    cell = CELLS[name]
    report = drill(cell)
    assert report.problems == ()
    assert report.identical
    assert report.relaunches == cell.recoveries
    assert len(report.recoveries) == cell.recoveries
    for recovery, expected in zip(report.recoveries, cell.restored, strict=False):
        assert is_version(recovery.version, expected)
    for recovery in report.recoveries:
        assert sum(recovery.phases.values()) == pytest.approx(recovery.total_s, abs=1e-5)
