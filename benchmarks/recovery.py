"""SIGKILL of one rank to the first step that all ranks have finished: every kind of recovery, and other tools.

A small GPT trains on CPU ranks. A random rank, which may be rank 0, is killed repeatedly at random moments. All rows
are measured in one run, in alternating blocks. torchft and NVIDIA's resiliency extension are included if `make
bench-rivals` has installed them.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.exactness import compare
from benchmarks.kills import Opponent, add_options, complete, files, run
from benchmarks.processes import with_ckptless_run, with_torchrun
from benchmarks.recovery_tables import ladder_table, phases_of_kinds_table
from benchmarks.relaunch_tables import moments_table, stock_table
from benchmarks.report import Report, base_parser, console, progress_bar
from benchmarks.rivals.environment import DEFAULT_PYTHON, RivalsMissingError, rivals, versions

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
    add_options(parser, (*OPPONENTS, *rivals(DEFAULT_PYTHON, RANKS, EVERY)), repeats=30, block=6)
    parser.add_argument(
        "--rivals-python",
        type=Path,
        default=DEFAULT_PYTHON,
        metavar="PATH",
        help="Python of the environment that `make bench-rivals` sets up (default: %(default)s, if it exists)",
    )
    args = complete(parser.parse_args())
    opponents, installed = with_rivals(args.rivals_python.absolute())
    report = Report(args)
    with progress_bar() as progress:
        results = run(args, opponents, progress) | {"rivals": installed}
        compare(results["kills"], opponents, args.size)
    tables = [
        ladder_table(results, RANKS),
        phases_of_kinds_table(results),
        moments_table(results),
        stock_table(results),
    ]
    report.finish(tables, results)


def with_rivals(python: Path) -> tuple[tuple[Opponent, ...], dict[str, str]]:
    """Return all opponents that are available here, and the versions of the rivals' packages."""
    try:
        installed = versions(python)
    except RivalsMissingError as error:
        console.print(f"torchft and nvidia-resiliency-ext are not measured: {error}", markup=False)
        return OPPONENTS, {}
    return (*OPPONENTS, *rivals(python, RANKS, EVERY)), installed


if __name__ == "__main__":
    main()
