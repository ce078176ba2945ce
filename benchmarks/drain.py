"""How long training pauses when a rank is drained: from the step after which it is handed over to the next one.

A small GPT trains on CPU ranks. Ranks are drained one after another, rank 0 every other time, by the same request as
`ckptless drain` makes. The others wait from the end of the last step to the first one that the new process takes part
in: that time, less a usual step, is the pause.
"""

from __future__ import annotations

import random
from argparse import ArgumentParser, Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.processes import ckptless_run, scratch
from benchmarks.harness.report import Default, Program, Results, Steps, add_count
from benchmarks.harness.scenario import OURS, Scenario, events_of, running
from benchmarks.harness.table import Column, Group, Table, count_of, each, name_of, p95, verdict
from benchmarks.harness.watch import START_S, Watch
from benchmarks.recovery import phase
from lightning_ckptless.ledger import LEDGER_NAME
from lightning_ckptless.membership.requests import DrainRequest, submit

EVERY_STEPS = 20
TIMEOUT_S = 120.0
TARGET_S = 0.1
RANK_0, ANOTHER = "rank 0", "another rank"

Drain = dict[str, Any]


def drain_one(watch: Watch, run: Path, rank: int) -> Drain:
    """Drain a rank, and return how long the others have waited.

    Args:
        watch: the job.
        run: folder of the run.
        rank: the rank.
    """
    watch.until_step(max(life.first_step for life in watch.until_begun()) + EVERY_STEPS, START_S)
    step_s = watch.now()[0].step_s
    with ThreadPoolExecutor(1) as terminal:
        asked = terminal.submit(submit, run, DrainRequest(rank=rank), timeout_s=TIMEOUT_S)
        watch.until(lambda _: asked.done(), TIMEOUT_S, f"the hand-over of rank {rank}")
    answer = asked.result()
    assert answer.accepted, answer.reason
    drained = events_of(run, "drained")[-1]
    step = int(drained["step"])
    lives = watch.until_step(step + 2, START_S)
    others = [life for life in lives if step in life.steps]
    waited_s = max(life.steps[step + 1] - life.steps[step] for life in others)
    return {
        "rank": rank,
        "step_s": step_s,
        "waited_s": waited_s,
        "pause_s": max(0.0, waited_s - step_s),
        "exit_code": drained["exit_code"],
    }


def measure(args: Namespace, results: Results, steps: Steps) -> None:
    """Drain ranks `args.repeats` times, in one job."""
    chance, scenario = random.Random(args.seed), Scenario("drain", ckptless_run(), OURS.but(devices=args.ranks))
    results["drains"] = []
    steps.expect(args.repeats)
    with scratch() as place, running(scenario, place, "job", size=args.size) as (watch, folder):
        for number in range(args.repeats):
            rank = 0 if number % 2 == 0 else 1 + chance.randrange(args.ranks - 1)
            steps.begin(f"rank {rank}")
            watch.until_begun()
            [run] = (ledger.parent for ledger in folder.glob(f"runs/*/{LEDGER_NAME}"))
            results["drains"].append(drain_one(watch, run, rank))
            steps.done()
        for drain, recovery in zip(results["drains"], events_of(folder, "recovery"), strict=False):
            drain |= {"replayed": recovery["steps_replayed"], "ledger": recovery}


def tables(args: Namespace, results: Results) -> list[Table]:
    """Return the table of pauses."""
    drains = results["drains"]
    groups = [
        Group(name, [drain for drain in drains if (drain["rank"] == 0) == (name == RANK_0)], drains)
        for name in (RANK_0, ANOTHER)
    ]
    columns = (
        Column("drained", name_of),
        Column("times", count_of),
        Column("exit code 0", lambda group: sum(item["exit_code"] == 0 for item in group.items)),
        Column("steps replayed", each("replayed"), "d", sum),
        Column("step s", each("step_s"), ".3f", median),
        Column("pause p50 s", each("pause_s"), ".3f", median),
        Column("pause p95 s", each("pause_s"), ".3f", p95),
        *map(phase, ("detect_s", "regroup_s", "restore_s")),
    )
    pause_s = median(drain["pause_s"] for drain in drains)
    notes = [f"Pause in addition to one step, median of all: {verdict(pause_s, TARGET_S, 's')}"]
    return [Table.of(f"Draining one of {args.ranks} ranks", groups, *columns, notes=notes)]


def add_options(parser: ArgumentParser) -> None:
    """Add the options of the program."""
    add_count(parser, "--repeats", Default(20, 2), "drained ranks")
    add_count(parser, "--ranks", 4, "ranks of the job")
    parser.add_argument("--size", default="1M", help="model size (default: %(default)s)")
    add_count(parser, "--seed", 1, "seed of the ranks")


PROGRAM = Program(__doc__, measure, tables, add_options)

if __name__ == "__main__":
    PROGRAM.main()
