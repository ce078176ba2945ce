"""Common kinds of models, optimizers and callbacks: killed, and compared bit for bit with the undisturbed run."""

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
"""Each shard is copied to the other rank, so the bytes sent show which tensors were skipped."""

CELLS = {
    "unfrozen": Cell(
        "kill:rank=0:step=3,kill:rank=1:step=6:at=optimizer_step",
        replace(BASE, thaw_at=4, strategy_options="{'failure_domain': 'rank', 'find_unused_parameters': True}"),
        recoveries=2,
    ),
    "compiled": Cell("kill:rank=1:step=4", replace(SHORT, block="compiled:aot_eager")),
    "8_bits-adagrad": Cell("kill:rank=0:step=5:at=optimizer_step", replace(SHORT, optimization="two_odd")),
    "fused-foreach": Cell("kill:rank=1:step=5:at=mirror", replace(SHORT, optimization="two_quick")),
    # Before averaging begins, and in the extra epoch that updates the batch norm statistics.
    "averaging": Cell("kill:rank=0:step=4,kill:rank=1:step=13", replace(BASE, callback="averaging"), recoveries=2),
    # In the step that adds the parameter group, and after it.
    "finetuning": Cell(
        "kill:rank=1:step=7:at=optimizer_step,kill:rank=0:step=9", replace(BASE, callback="finetuning"), recoveries=2
    ),
    # After the first learning rate search, and during the second.
    "searching": Cell("kill:rank=0:step=3", replace(BASE, callback="searching"), recoveries=2),
    # A new process in the place of either rank, and survivors that are taken back.
    "peculiar": Cell("kill:rank=1:step=3,kill:rank=0:step=5", replace(SHORT, callback="peculiar"), recoveries=2),
    "peculiar-compared": Cell(
        "kill:rank=1:step=5",
        replace(SHORT, callback="peculiar", strategy_options="{'failure_domain': 'rank'}"),
    ),
    "peculiar-device": Cell(
        "kill:rank=0:step=5",
        replace(SHORT, callback="peculiar", strategy_options="{'device_tier': 'on', 'mirror_every_n_steps': 3}"),
    ),
    "sharded-mixed": Cell("kill:rank=1:step=4:at=backward", replace(SHORT, mesh="2x1", sharding="mixed")),
    "sharded-bf16": Cell("kill:rank=0:step=4", replace(SHORT, mesh="2x1", precision="bf16-mixed")),
    "sharded-offloaded": Cell("kill:rank=0:step=4", replace(SHORT, mesh="2x1", sharding="offloaded")),
}


LONG = ("sharded-mixed", "peculiar-compared", "peculiar-device")


@pytest.mark.parametrize(("replicas", "times"), [("verify", 1), pytest.param("send", 2, marks=pytest.mark.long)])
def test_kill_with_mostly_frozen_weights(replicas: str, times: int, drill: Drill) -> None:
    asked = repr({"failure_domain": "rank", "replicas": replicas})
    cell = Cell("kill:rank=1:step=3:at=backward", replace(BASE, block="adapted", strategy_options=asked))
    report = _assert_survived(cell, drill)
    # Half of the frozen weights, and a buffer of each rank. The trained weights are about a kilobyte.
    shard_bytes = 4 * WIDE * (16 + 16)
    (path,) = (report.faulted.folder / "cwd").rglob("metrics.csv")
    with path.open() as file:
        mirrored = [float(row[BYTES]) for row in csv.DictReader(file) if row.get(BYTES)]
    # Each is written once into both slots, and sent once if a holder does not copy its own; later versions copy the
    # buffer and send neither.
    assert mirrored[-1] < shard_bytes <= times * shard_bytes < max(mirrored)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in CELLS]
)
def test_kill(name: str, drill: Drill) -> None:
    _assert_survived(CELLS[name], drill)


@pytest.mark.parametrize(
    "how", ["data", pytest.param("counted", marks=pytest.mark.long), pytest.param("replaced", marks=pytest.mark.long)]
)
def test_kill_with_a_moving_average_of_the_model(how: str, drill: Drill) -> None:
    """The survivor updates the average in the forward pass of the replayed step, before any optimizer step."""
    faults = "kill:rank=1:step=4,kill:rank=0:step=6:at=backward"
    _assert_survived(Cell(faults, replace(SHORT, block=f"following:{how}"), recoveries=2), drill)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ to compile for CPUs")
def test_kill_with_a_model_compiled_by_inductor(drill: Drill) -> None:
    _assert_survived(Cell("kill:rank=1:step=4", replace(SHORT, block="compiled:inductor")), drill)


def _assert_survived(cell: Cell, drill: Drill) -> DrillReport:
    report = drill(cell, Ladder(max_restarts=20))
    assert report.problems == ()
    assert report.identical
    assert (report.in_place, report.relaunches) == (cell.recoveries, 0)
    return report
