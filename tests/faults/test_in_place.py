"""Faults during a recovery in place, and faults other than the death of a process."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from lightning_ckptless.testing.drill import DrillReport
from lightning_ckptless.testing.starters import Ladder
from tests.faults.conftest import Drill
from tests.faults.matrix import BASE, FOUR, Cell
from tests.lab.parts import Options

LONG = replace(BASE, samples=800, epochs=1)
"""Two ranks, a hundred steps: time for a standby to start."""
WATCHED = replace(BASE, strategy_options="{'hang_timeout_s': 1.0}")
MANY = replace(BASE, devices=32, samples=768, epochs=1)
"""32 ranks, six steps: more ranks than the usual default backlog of a listening socket."""
FIRST = "kill:rank=1:step=4"


@dataclass(frozen=True)
class Hazard:
    """One drill.

    Args:
        faults: a fault script.
        in_place: expected number of recoveries in place.
        relaunches: expected number of relaunches.
        recoveries: expected number of recoveries that reach a step.
        options: the training configuration.
        standbys: number of standbys.
        overtaken: how many recoveries may meet the next fault before their step is committed on all ranks.
    """

    faults: str
    in_place: int
    relaunches: int = 0
    recoveries: int = 1
    options: Options = BASE
    standbys: int = 0
    overtaken: int = 0


HAZARDS = {
    # The second fault hits the recovery from the first.
    "survivor=0-during=regroup": Hazard(f"{FIRST},kill:rank=0:step=4:at=regroup", in_place=2),
    "replacement=1-during=regroup": Hazard(f"{FIRST},kill:rank=1:step=4:at=regroup", in_place=2),
    "survivor=0-during=restore": Hazard(f"{FIRST},kill:rank=0:step=4:at=restore", in_place=2),
    "replacement=1-during=restore": Hazard(f"{FIRST},kill:rank=1:step=4:at=restore", in_place=2),
    "replacement=1-during=restore-twice": Hazard(f"{FIRST},kill:rank=1:step=4:at=restore:times=2", 2, relaunches=1),
    # The other ranks block inside torch, waiting for an address that is never published.
    "survivor=0-during=connect": Hazard(f"{FIRST},kill:rank=0:step=4:at=connect", in_place=2),
    "replacement=1-during=connect": Hazard(f"{FIRST},kill:rank=1:step=4:at=connect:times=3", in_place=4),
    "survivor=0-stopped-during=connect": Hazard(f"{FIRST},stop:rank=0:step=4:at=connect", in_place=2, options=WATCHED),
    "standby-during=promotion": Hazard(
        "kill:rank=1:step=90,kill:rank=1:step=90:at=regroup", in_place=2, options=LONG, standbys=1
    ),
    "two_of_four-at_once": Hazard("kill:rank=1:step=3,kill:rank=2:step=3", in_place=1, options=FOUR),
    "rank=0-hangs": Hazard("hang:rank=0:step=4", in_place=1, options=WATCHED),
    "survivor=0-hangs-during=regroup": Hazard(f"{FIRST},hang:rank=0:step=4:at=regroup", in_place=2, options=WATCHED),
    # No rank lags behind the others, so the ranks are asked.
    "rank=0-hangs-during=backward": Hazard("hang:rank=0:step=4:at=backward", in_place=1, options=WATCHED),
    "survivor=0-hangs-during=restore": Hazard(f"{FIRST},hang:rank=0:step=4:at=restore", in_place=2, options=WATCHED),
    "replacement=1-hangs-during=restore": Hazard(f"{FIRST},hang:rank=1:step=4:at=restore", in_place=2, options=WATCHED),
    "rank=0-hangs-during=last_epoch_end": Hazard("hang:rank=0:step=12:at=epoch_end", in_place=1, options=WATCHED),
    "rank=1-stopped": Hazard("stop:rank=1:step=4:at=backward", in_place=1, options=WATCHED),
    "rank=0-segfault": Hazard("crash:rank=0:step=4", in_place=1),
    "rank=1-exits_with_code_0": Hazard("leave:rank=1:step=4", in_place=1),
    "ten_in_a_row": Hazard(
        ",".join(f"kill:rank={step % 2}:step={step}" for step in range(2, 12)), in_place=10, recoveries=10, overtaken=5
    ),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_hazard(name: str, drill: Drill) -> None:
    hazard = HAZARDS[name]
    report: DrillReport = drill(Cell(hazard.faults, hazard.options), Ladder(20, standbys=hazard.standbys))
    assert report.problems == ()
    assert report.identical
    # Two simultaneous deaths are one fault or two, depending on when they are detected.
    assert report.in_place in (hazard.in_place, hazard.in_place + ("at_once" in name))
    assert report.relaunches == hazard.relaunches
    assert hazard.recoveries - hazard.overtaken <= len(report.recoveries) <= hazard.recoveries
    if hazard.recoveries == 1:
        # An attempt interrupted by another fault is part of the recovery.
        died_at = [event.fields["died_at"] for event in report.faulted.events if event.event == "fault"]
        assert report.recoveries[0].total_s >= died_at[-1] - died_at[0]
        assert report.recoveries[0].cause.count("; then ") == len(died_at) - 1


@pytest.mark.long
def test_thirty_two_ranks(drill: Drill) -> None:
    report = drill(Cell("kill:rank=17:step=3", MANY), Ladder(20))
    assert report.problems == ()
    assert report.identical
    assert (report.in_place, report.relaunches, len(report.recoveries)) == (1, 0, 1)
    assert report.recoveries[0].culprit_rank == 17
