"""How the time of a recovery in place grows with the number of ranks, by phase.

The same small model trains on two, four and eight ranks of one machine. If there are more ranks than cores, they wait
for a core, also during recovery: the phases show what grows with the protocol and what with that wait.
"""

from __future__ import annotations

from typing import Any

from benchmarks.kills import Opponent, add_options, complete, run
from benchmarks.processes import with_ckptless_run
from benchmarks.quantiles import median
from benchmarks.recovery_tables import phases_of_kinds_table
from benchmarks.relaunch_tables import survived
from benchmarks.report import Report, base_parser, progress_bar
from benchmarks.tables import Table, verdict

EVERY = 10
OPPONENTS = tuple(
    Opponent(f"{ranks} ranks", with_ckptless_run, ranks=ranks, every=EVERY, strategy_options={"standbys": 1})
    for ranks in (2, 4, 8)
)
TARGET = 1.3


def growth_table(results: dict[str, Any]) -> Table:
    """Return the table of recovery times, with regroup and restore relative to those of two ranks."""
    table = Table(
        "Recovery in place with a standby, by ranks",
        ("ranks", "kills", "p50 s", "max s", "regroup + restore s", "growth"),
    )
    seconds = {name: _regroup_and_restore_s(kills) for name, kills in results["kills"].items()}
    smallest_s = next(iter(seconds.values()))
    for name, kills in results["kills"].items():
        good = [kill["seconds"] for kill in survived(kills)]
        grown = f"{seconds[name] / smallest_s:.2f}x" if good else ""
        table.add(name, len(kills), f"{median(good):.2f}", f"{max(good):.2f}", f"{seconds[name]:.3f}", grown)
    largest_s = [*seconds.values()][-1]
    table.note(f"From {OPPONENTS[0].name} to {OPPONENTS[-1].name}: {verdict(largest_s / smallest_s, TARGET, 'x')}")
    return table


def _regroup_and_restore_s(kills: list[Any]) -> float:
    phases = [kill["ledger"]["phases"] for kill in survived(kills) if "ledger" in kill]
    return median([phase["regroup_s"] + phase["restore_s"] for phase in phases])


def main() -> None:
    """Read the command line, measure, report."""
    parser = base_parser(__doc__)
    add_options(parser, OPPONENTS, repeats=12, block=4)
    parser.set_defaults(size="tiny")
    args = complete(parser.parse_args())
    args.stock_tries = 0
    report = Report(args)
    with progress_bar() as progress:
        results = run(args, OPPONENTS, progress)
    report.finish([growth_table(results), phases_of_kinds_table(results)], results)


if __name__ == "__main__":
    main()
