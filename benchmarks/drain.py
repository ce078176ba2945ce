"""How long training pauses when a rank is drained: from the step after which it is handed over to the next one.

A small GPT trains on CPU ranks. Ranks are drained one after another, rank 0 every other time, by the same request as
`ckptless drain` makes. The others wait from the end of the last step to the first one that the new process takes part
in: that time, less a usual step, is the pause.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.benchmark import Benchmark, Results, Steps, option
from benchmarks.harness.kills import phase_s
from benchmarks.harness.processes import ckptless_run, scratch
from benchmarks.harness.scenario import OURS, Scenario, events_of, running
from benchmarks.harness.table import Column, Group, Table, count_of, each, p95, verdict
from benchmarks.harness.watch import START_S, Watch
from lightning_ckptless.ledger import LEDGER_NAME
from lightning_ckptless.membership.requests import DrainRequest, submit

RANKS, EVERY_STEPS = 4, 20
TIMEOUT_S, TARGET_S = 120.0, 0.1


def drain_one(watch: Watch, run: Path, rank: int) -> dict[str, Any]:
    """Drain a rank of the job whose run has this folder, and return how long the others have waited."""
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
    waited_s = max(life.steps[step + 1] - life.steps[step] for life in lives if step in life.steps)
    return {
        "rank": rank, "step_s": step_s, "pause_s": max(0.0, waited_s - step_s), "exit_code": drained["exit_code"],
    }  # fmt: skip


def phase(name: str) -> Column:
    return Column(name.removesuffix("_s"), lambda group: phase_s(group.items, name), ".3f", median)


COLUMNS = (
    Column("drained", 0),
    Column("times", count_of),
    Column("exit code 0", lambda group: sum(item["exit_code"] == 0 for item in group.items)),
    Column("steps replayed", lambda group: sum(item["ledger"]["steps_replayed"] for item in group.items)),
    Column("step s", each("step_s"), ".3f", median),
    Column("pause p50 s", each("pause_s"), ".3f", median),
    Column("pause p95 s", each("pause_s"), ".3f", p95),
    *map(phase, ("detect_s", "regroup_s", "restore_s")),
)


@dataclass
class Drain(Benchmark):
    repeats: int = option(20, "drained ranks", quick=2)
    size: str = option("1M", "model size")

    def measure(self, results: Results, steps: Steps) -> None:
        chance, scenario = random.Random(1), Scenario("drain", ckptless_run(), OURS.but(devices=RANKS))
        results["drains"] = drains = []
        steps.expect(self.repeats)
        with scratch() as place, running(scenario, place, "job", size=self.size) as (watch, folder):
            watch.until_begun()
            [run] = (ledger.parent for ledger in folder.glob(f"runs/*/{LEDGER_NAME}"))
            for number in range(self.repeats):
                rank = 0 if number % 2 == 0 else 1 + chance.randrange(RANKS - 1)
                steps.begin(f"rank {rank}")
                drains.append(drain_one(watch, run, rank))
                steps.done()
            for drain, recovery in zip(drains, events_of(folder, "recovery"), strict=False):
                drain["ledger"] = recovery

    def tables(self, results: Results) -> list[Table]:
        drains = results["drains"]
        groups = [
            Group("rank 0", [drain for drain in drains if drain["rank"] == 0]),
            Group("another rank", [drain for drain in drains if drain["rank"] != 0]),
        ]
        pause_s = median(drain["pause_s"] for drain in drains)
        notes = [f"Pause in addition to one step, median of all: {verdict(pause_s, TARGET_S, 's')}"]
        return [Table.of(f"Draining one of {RANKS} ranks", groups, *COLUMNS, notes=notes)]


if __name__ == "__main__":
    Drain.main()
