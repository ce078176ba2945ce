"""What can go wrong while a run recovers in place, and what a process can do beside dying."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from lightning_ckptless.testing.drill import DrillReport
from lightning_ckptless.testing.starters import Ladder
from tests.faults.conftest import Drill
from tests.faults.matrix import BASE, FOUR, Cell
from tests.lab.parts import Options

PATIENT = replace(BASE, samples=800, epochs=1)
"""A hundred steps on each of two ranks: time for a standby to come."""
WATCHED = replace(BASE, strategy_options="{'hang_timeout_s': 1.0}")
MANY = replace(BASE, devices=32, samples=768, epochs=1)
"""Six steps on each of 32 ranks, more than any queue of connections that a library makes by default is for."""
FIRST = "kill:rank=1:step=4"


@dataclass(frozen=True)
class Hazard:
    """One drill.

    Args:
        faults: what goes wrong.
        in_place: how often workers are replaced while the others go on.
        relaunches: how often all are started again.
        recoveries: how many of them come to a step.
        overtaken: how many of those may be hit by the next fault before that step is committed everywhere.
        options: what is trained.
        standbys: processes that wait for a rank.
    """

    faults: str
    in_place: int
    relaunches: int = 0
    recoveries: int = 1
    options: Options = BASE
    standbys: int = 0
    overtaken: int = 0


HAZARDS = {
    # Each of the two fights for the same step.
    "survivor=0-during=regroup": Hazard(f"{FIRST},kill:rank=0:step=4:at=regroup", in_place=2),
    "newcomer=1-during=regroup": Hazard(f"{FIRST},kill:rank=1:step=4:at=regroup", in_place=2),
    "survivor=0-during=restore": Hazard(f"{FIRST},kill:rank=0:step=4:at=restore", in_place=2),
    "newcomer=1-during=restore": Hazard(f"{FIRST},kill:rank=1:step=4:at=restore", in_place=2),
    "newcomer=1-during=restore-twice": Hazard(f"{FIRST},kill:rank=1:step=4:at=restore:times=2", 2, relaunches=1),
    # The others wait inside of torch, for an address that never comes.
    "survivor=0-during=meet": Hazard(f"{FIRST},kill:rank=0:step=4:at=meet", in_place=2),
    "newcomer=1-during=meet": Hazard(f"{FIRST},kill:rank=1:step=4:at=meet:times=3", in_place=4),
    "survivor=0-stopped-during=meet": Hazard(f"{FIRST},stop:rank=0:step=4:at=meet", in_place=2, options=WATCHED),
    "standby-during=promotion": Hazard(
        "kill:rank=1:step=90,kill:rank=1:step=90:at=regroup", in_place=2, options=PATIENT, standbys=1
    ),
    "two_of_four-at_once": Hazard("kill:rank=1:step=3,kill:rank=2:step=3", in_place=1, options=FOUR),
    "rank=0-hangs": Hazard("hang:rank=0:step=4", in_place=1, options=WATCHED),
    "survivor=0-hangs-during=regroup": Hazard(f"{FIRST},hang:rank=0:step=4:at=regroup", in_place=2, options=WATCHED),
    # Nobody is behind the others: they are asked.
    "rank=0-hangs-during=backward": Hazard("hang:rank=0:step=4:at=backward", in_place=1, options=WATCHED),
    "survivor=0-hangs-during=restore": Hazard(f"{FIRST},hang:rank=0:step=4:at=restore", in_place=2, options=WATCHED),
    "newcomer=1-hangs-during=restore": Hazard(f"{FIRST},hang:rank=1:step=4:at=restore", in_place=2, options=WATCHED),
    "rank=0-hangs-during=last_epoch_end": Hazard("hang:rank=0:step=12:at=epoch_end", in_place=1, options=WATCHED),
    "rank=1-stopped": Hazard("stop:rank=1:step=4:at=backward", in_place=1, options=WATCHED),
    "rank=0-segfault": Hazard("crash:rank=0:step=4", in_place=1),
    "rank=1-leaves_with_code_0": Hazard("leave:rank=1:step=4", in_place=1),
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
    # Two ranks that die within the same moment are one fault or two, as they are seen.
    assert report.in_place in (hazard.in_place, hazard.in_place + ("at_once" in name))
    assert report.relaunches == hazard.relaunches
    assert hazard.recoveries - hazard.overtaken <= len(report.recoveries) <= hazard.recoveries
    if hazard.recoveries == 1:
        # A try that another fault has cut short belongs to the recovery.
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
