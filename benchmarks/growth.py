"""How the time of a recovery in place grows with the number of ranks, by phase.

The same small model trains on two, four and eight ranks of one machine. If there are more ranks than cores, they wait
for a core, also during recovery: the phases show what grows with the protocol and what with that wait.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from statistics import median

from benchmarks.harness import kills
from benchmarks.harness.kills import Kill, survived
from benchmarks.harness.processes import ckptless_run
from benchmarks.harness.report import Program, Results
from benchmarks.harness.scenario import OURS, Scenario
from benchmarks.harness.table import Column, Table, each, name_of, verdict
from benchmarks.recovery import groups_of, phases_table

SCENARIOS = tuple(
    Scenario(f"{ranks} ranks", ckptless_run(), OURS.but(devices=ranks, strategy_options={"standbys": 1}), every=10)
    for ranks in (2, 4, 8)
)
TARGET = 1.3


def regroup_and_restore_s(found: list[Kill]) -> float:
    phases = [kill["ledger"]["phases"] for kill in survived(found) if "ledger" in kill]
    return float(median(phase["regroup_s"] + phase["restore_s"] for phase in phases))


def tables(_: Namespace, results: Results) -> list[Table]:
    """Return the table of recovery times, with regroup and restore relative to the fewest ranks, and of the phases."""
    seconds_of = {ranks: regroup_and_restore_s(found) for ranks, found in results["kills"].items()}
    ordered = [*seconds_of.values()]
    least, most = ordered[0], ordered[-1]
    columns = (
        Column("ranks", name_of),
        Column("kills", lambda group: len(group.context)),
        Column("p50 s", each("seconds"), ".2f", median),
        Column("max s", each("seconds"), ".2f", max),
        Column("regroup + restore s", lambda group: seconds_of[group.name], ".3f"),
        Column("growth", lambda group: f"{seconds_of[group.name] / least:.2f}x"),
    )
    notes = [f"From {SCENARIOS[0].name} to {SCENARIOS[-1].name}: {verdict(most / least, TARGET, 'x')}"]
    title = "Recovery in place with a standby, by ranks"
    return [Table.of(title, groups_of(results), *columns, notes=notes), phases_table(results)]


PROGRAM = Program(
    __doc__,
    partial(kills.measure, every_scenario=SCENARIOS),
    tables,
    partial(kills.add_options, scenarios=SCENARIOS, repeats=12, block=4, size="tiny"),
)

if __name__ == "__main__":
    PROGRAM.main()
