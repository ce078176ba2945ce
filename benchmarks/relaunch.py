"""SIGKILL of one rank to the first step that all ranks have finished, with a relaunch of all ranks.

A small GPT trains on two CPU ranks. A random rank is killed repeatedly at random moments. The comparison is torchrun
with Lightning's `ddp` and a checkpoint file every 50 steps, from which the restarted script resumes.
"""

from __future__ import annotations

from functools import partial

from benchmarks.harness import kills
from benchmarks.harness.kills import Scenario, with_files
from benchmarks.harness.processes import ckptless_run, torchrun
from benchmarks.harness.report import Program
from benchmarks.recovery import FRESH, RELAUNCH, all_tables

RANKS = 2
SCENARIOS = (
    Scenario(RELAUNCH, ckptless_run("--no-in-place")),
    Scenario(FRESH, ckptless_run("--no-in-place", "--no-preload")),
    Scenario("torchrun, ckptless", torchrun),
    with_files(RANKS),
)

PROGRAM = Program(
    __doc__,
    partial(kills.measure, every_scenario=SCENARIOS),
    lambda _, results: all_tables(results, RANKS),
    partial(kills.add_options, scenarios=SCENARIOS, repeats=12, block=4),
)

if __name__ == "__main__":
    PROGRAM.main()
