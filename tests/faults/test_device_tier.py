"""The device tier: after a fault, a version that is newer than any in the arenas, and the same result bit for bit."""

from __future__ import annotations

import ast
import re
from dataclasses import replace

import pytest

from lightning_ckptless.ledger import LEDGER_NAME, read_ledger
from lightning_ckptless.testing.drill import DrillReport
from lightning_ckptless.testing.starters import Ladder
from tests.faults.conftest import Drill, events_of
from tests.faults.matrix import BASE, CELLS, FOUR, Cell

IN_PLACE = Ladder(max_restarts=5)
TIERED = [name for name, cell in CELLS.items() if "'send'" not in (cell.options.strategy_options or "")]
"""A device tier needs replicas that are compared."""
TELLING = ("rank=0-during=backward",)
"""Cells that are part of every run of the suite."""


def with_device_tier(cell: Cell) -> Cell:
    """The cell with a device tier, and with arenas that usually get a version only every five steps."""
    given = ast.literal_eval(cell.options.strategy_options or "{}")
    # That validation waits for the commit of each version before it.
    every = 1 if cell.options.validate_after_commit else 5
    options = {"mirror_every_n_steps": every} | given | {"device_tier": "on"}
    return replace(cell, options=replace(cell.options, strategy_options=repr(options)))


@pytest.mark.parametrize(
    "name", [name if name in TELLING else pytest.param(name, marks=pytest.mark.long) for name in TIERED]
)
def test_kill(name: str, drill: Drill) -> None:
    cell = with_device_tier(CELLS[name])
    report = drill(cell, IN_PLACE)
    assert report.problems == ()
    assert report.identical
    if "rank=all" in cell.faults:
        # No device memory is left.
        assert all(not recovery.sources.get("device tier") for recovery in report.recoveries)
        return
    assert report.in_place == len(report.recoveries) == cell.recoveries
    for recovery, expected in zip(report.recoveries, cell.restored, strict=False):
        # A version is in device memory before its round of the mirror, in which a fault may strike.
        assert step_of(recovery.version) >= step_of(expected) - 1
    for version, newest_in_arenas, sources in restored(report):
        assert sources["device tier"] > 0 or version == newest_in_arenas
        assert step_of(version) >= step_of(newest_in_arenas)


def restored(report: DrillReport) -> list[tuple[str, str, dict[str, int]]]:
    """Each restored version, the newest version in the arenas at that time, and where its shards came from."""
    assert report.faulted.run_folder is not None
    events = read_ledger(report.faulted.run_folder / LEDGER_NAME, only="restored").events
    return [(e.fields["version"], e.fields["newest_in_arenas"], e.fields["sources"]) for e in events]


def step_of(version: str) -> int:
    return int(re.findall(r"\d+", version)[0])


@pytest.mark.long
def test_the_arenas_are_left_when_all_holders_of_a_shard_are_lost(drill: Drill) -> None:
    options = replace(FOUR, strategy_options=repr({"mirror_every_n_steps": 3, "device_tier": "on"}))
    # Both have the gradients of the step, so neither waits for the other any more.
    faults = "kill:rank=0:step=6:at=optimizer_step,kill:rank=1:step=6:at=optimizer_step"
    report = drill(Cell(faults, options), IN_PLACE)
    assert report.problems == ()
    assert report.identical
    assert report.in_place >= 1
    version, newest_in_arenas, sources = restored(report)[0]
    assert (version, newest_in_arenas, sources["device tier"]) == ("step 3", "step 3", 0)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["", ",kill:rank=2:step=9:at=rewind"], ids=["alone", "and_a_rank_is_lost"])
def test_a_flipped_bit_is_healed_from_the_arenas(fault: str, drill: Drill) -> None:
    given = {"failure_domain": "rank", "copies": 2, "mirror_every_n_steps": 3, "device_tier": "on"}
    options = replace(BASE, devices=3, samples=72, strategy_options=repr(given))
    # The versions of steps 7 and 8 are in device memory, with the flip, and any rank has all their shards.
    report = drill(Cell(f"flip:rank=1:step=7:tensor=parameter/head.weight:element=5:bit=30{fault}", options), IN_PLACE)
    assert report.problems == () and report.identical
    [divergence] = events_of(report.faulted, "divergence")
    assert (divergence.fields["step"], divergence.fields["consequence"]) == (9, "go_back")
    assert report.in_place == len(report.recoveries) == bool(fault)
    for version, newest_in_arenas, sources in restored(report):
        assert version == newest_in_arenas == "step 6" and sources["device tier"] == 0
