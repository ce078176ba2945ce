"""SIGKILL of one rank to the first step that all ranks have finished: every rung of the ladder, and others.

A small GPT trains on CPU ranks; again and again a random rank, rank 0 as well, is killed at a random moment. All rows
are measured in one run, in blocks that alternate.
"""

from __future__ import annotations

from benchmarks.kills import Opponent, add_options, complete, files, run
from benchmarks.processes import with_ckptless_run, with_torchrun
from benchmarks.recovery_tables import ladder_table, phases_of_kinds_table
from benchmarks.relaunch_tables import moments_table, stock_table
from benchmarks.report import Report, base_parser, progress_bar

RANKS = 4
EVERY = 20
STANDBY, IN_PLACE = "in place, standby", "in place, new process"
RELAUNCH, FRESH = "relaunch, preloaded", "relaunch, new interpreters"

OPPONENTS = (
    Opponent(STANDBY, with_ckptless_run, ranks=RANKS, every=EVERY, strategy_options={"standbys": 1}),
    Opponent(IN_PLACE, with_ckptless_run, ranks=RANKS, every=EVERY),
    Opponent(RELAUNCH, lambda options: with_ckptless_run(options, "--no-in-place"), ranks=RANKS, every=EVERY),
    Opponent(
        FRESH, lambda options: with_ckptless_run(options, "--no-in-place", "--no-preload"), ranks=RANKS, every=EVERY
    ),
    Opponent("torchrun, ckptless", with_torchrun, ranks=RANKS, every=EVERY),
    files(RANKS),
)


def main() -> None:
    """Read the command line, measure, report."""
    parser = base_parser(__doc__)
    add_options(parser, OPPONENTS, repeats=30, block=6)
    args = complete(parser.parse_args())
    report = Report(args)
    with progress_bar() as progress:
        results = run(args, OPPONENTS, progress)
    tables = [
        ladder_table(results, RANKS),
        phases_of_kinds_table(results),
        moments_table(results),
        stock_table(results),
    ]
    report.finish(tables, results)


if __name__ == "__main__":
    main()
