"""Kinds of models and optimizers that people train: killed, and compared bit for bit with the run left alone."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace

import pytest

from lightning_ckptless.testing.drill import DrillReport
from lightning_ckptless.testing.starters import Ladder
from tests.faults.conftest import Drill
from tests.faults.matrix import BASE, Cell
from tests.lab.kinds import WIDE

BYTES = "ckptless/mirrored_bytes"

SHORT = replace(BASE, epochs=1)
ON_EACH = "{'failure_domain': 'rank'}"
"""A copy of each shard on the other rank: what is left out of the sending shows."""

CELLS = {
    "thawed": Cell(
        "kill:rank=0:step=3,kill:rank=1:step=6:at=optimizer_step",
        replace(BASE, thaw_at=4, strategy_options="{'failure_domain': 'rank', 'find_unused_parameters': True}"),
        recoveries=2,
    ),
    "compiled": Cell("kill:rank=1:step=4", replace(SHORT, block="compiled:aot_eager")),
    "8_bits-adagrad": Cell("kill:rank=0:step=5:at=optimizer_step", replace(SHORT, optimization="two_odd")),
    "fused-foreach": Cell("kill:rank=1:step=5:at=mirror", replace(SHORT, optimization="two_quick")),
    # Before the averaging has begun, and in the epoch that is run for the statistics of batch norm.
    "averaging": Cell("kill:rank=0:step=4,kill:rank=1:step=13", replace(BASE, callback="averaging"), recoveries=2),
    # In the step that adds the group, and after it.
    "finetuning": Cell(
        "kill:rank=1:step=7:at=optimizer_step,kill:rank=0:step=9", replace(BASE, callback="finetuning"), recoveries=2
    ),
    # After the first search, and in the middle of the second.
    "searching": Cell("kill:rank=0:step=3", replace(BASE, callback="searching"), recoveries=2),
    "sharded-mixed": Cell("kill:rank=1:step=4:at=backward", replace(SHORT, mesh="2x1", sharding="mixed")),
    "sharded-bf16": Cell("kill:rank=0:step=4", replace(SHORT, mesh="2x1", precision="bf16-mixed")),
    "sharded-offloaded": Cell("kill:rank=0:step=4", replace(SHORT, mesh="2x1", sharding="offloaded")),
}


def test_kill_of_a_model_that_is_mostly_frozen(drill: Drill) -> None:
    cell = Cell("kill:rank=1:step=3:at=backward", replace(BASE, block="adapted", strategy_options=ON_EACH))
    report = _assert_survived(cell, drill)
    # Beside a kilobyte that is trained: half of the frozen weights, and a mask that each rank has for itself.
    shard_bytes = 4 * WIDE * (16 + 16)
    (path,) = (report.faulted.folder / "cwd").rglob("metrics.csv")
    with path.open() as file:
        mirrored = [float(row[BYTES]) for row in csv.DictReader(file) if row.get(BYTES)]
    # Into each of two slots, and to the other rank, once; then the mask is copied and nothing of both is sent.
    assert mirrored[-1] < shard_bytes < 2 * shard_bytes < max(mirrored)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name == "sharded-mixed" else name for name in CELLS]
)
def test_kill(name: str, drill: Drill) -> None:
    _assert_survived(CELLS[name], drill)


@pytest.mark.parametrize(
    "how", ["data", pytest.param("counted", marks=pytest.mark.long), pytest.param("replaced", marks=pytest.mark.long)]
)
def test_kill_of_a_model_with_a_slow_copy(how: str, drill: Drill) -> None:
    """The survivor has moved its copy in the step that is run again, before any optimizer has stepped."""
    faults = "kill:rank=1:step=4,kill:rank=0:step=6:at=backward"
    _assert_survived(Cell(faults, replace(SHORT, block=f"following:{how}"), recoveries=2), drill)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler for CPUs: g++ is not there")
def test_kill_of_a_model_that_was_compiled_to_machine_code(drill: Drill) -> None:
    _assert_survived(Cell("kill:rank=1:step=4", replace(SHORT, block="compiled:inductor")), drill)


def _assert_survived(cell: Cell, drill: Drill) -> DrillReport:
    report = drill(cell, Ladder(max_restarts=20))
    assert report.problems == ()
    assert report.identical
    assert (report.in_place, report.relaunches) == (cell.recoveries, 0)
    return report
