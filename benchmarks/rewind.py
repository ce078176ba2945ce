"""How long it takes to rewind a run: from the decision of all ranks until training resumes.

A small GPT trains on two ranks. At every few steps a rank asks for a rewind to a target further and further back. The
ledger has the duration of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from benchmarks.harness.benchmark import Benchmark, Results, Steps, option
from benchmarks.harness.processes import ckptless_run, scratch
from benchmarks.harness.scenario import OURS, Scenario, events_of, running
from benchmarks.harness.table import Column, Table, verdict
from lightning_ckptless import environment

HISTORY, HISTORY_EVERY = 16, 4
PERIOD = HISTORY * HISTORY_EVERY + 10
"""Steps after which the history is full again."""
TARGET_S = 0.5
JOB = OURS.but(strategy_options={"history": HISTORY, "history_every": HISTORY_EVERY})
COLUMNS = (Column("from step", "from_step"), Column("to", "version"), Column("s", "took_s", ".3f"))


@dataclass
class Rewind(Benchmark):
    size: str = option("10M", "model size")
    repeats: int = option(8, "number of rewinds", quick=2)

    def measure(self, results: Results, steps: Steps) -> None:
        back = [max(1, round((number + 1) * HISTORY * HISTORY_EVERY / self.repeats)) for number in range(self.repeats)]
        at = [PERIOD - 2 + number * PERIOD for number in range(self.repeats)]
        faults = ",".join(f"rewind:step={step}:to={step - depth}" for step, depth in zip(at, back, strict=True))
        scenario = Scenario("rewind", ckptless_run(), JOB, {environment.FAULTS: faults})
        steps.begin(f"{self.size}: {self.repeats} rewinds of {back[0]} to {back[-1]} steps")
        last = at[-1] + PERIOD
        with scratch() as place, running(scenario, place, "job", size=self.size, steps=last) as (watch, folder):
            watch.until_end()
            results["rewinds"] = events_of(folder, "rewind")

    def tables(self, results: Results) -> list[Table]:
        times = [rewind["took_s"] for rewind in results["rewinds"]]
        notes = [f"Median: {median(times):.3f} s", f"Longest: {verdict(max(times), TARGET_S, 's')}"]
        title = f"Rewinds of the {self.size} model on two ranks"
        return [Table.of(title, results["rewinds"], *COLUMNS, notes=notes)]


if __name__ == "__main__":
    Rewind.main()
