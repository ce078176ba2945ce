"""SIGKILL of one rank to the first step that all ranks have finished, with a relaunch of all ranks.

A small GPT trains on two CPU ranks. A random rank is killed repeatedly at random moments. The opponent is torchrun
with Lightning's `ddp` and a checkpoint file every 50 steps, from which the restarted script resumes.
"""

from __future__ import annotations

from benchmarks.kills import Opponent, add_options, complete, files, run
from benchmarks.processes import with_ckptless_run, with_torchrun
from benchmarks.relaunch_tables import moments_table, phases_table, stock_table, summary_table
from benchmarks.report import Report, base_parser, progress_bar

RANKS = 2


OPPONENTS = (
    Opponent("ckptless run", lambda options: with_ckptless_run(options, "--no-in-place")),
    Opponent("ckptless run --no-preload", lambda options: with_ckptless_run(options, "--no-in-place", "--no-preload")),
    Opponent("torchrun, ckptless", with_torchrun),
    files(RANKS),
)


def main() -> None:
    """Read the command line, measure, report."""
    parser = base_parser(__doc__)
    add_options(parser, OPPONENTS, repeats=12, block=4)
    args = complete(parser.parse_args())
    report = Report(args)
    with progress_bar() as progress:
        results = run(args, OPPONENTS, progress)
    report.finish(
        [summary_table(results, RANKS), phases_table(results), moments_table(results), stock_table(results)], results
    )


if __name__ == "__main__":
    main()
