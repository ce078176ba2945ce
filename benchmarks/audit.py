"""Silent data corruption: bits that flip in the memory of a rank, and ranks that compute wrongly. How many are found?

A small GPT trains on three ranks, each of which keeps a copy of all shards. After every few steps

- a random bit of a random element of a parameter or a moment changes on a random rank, or
- all matrix products of a random rank are wrong from then on, until its process is replaced. Every second step is
  checked by a replay.

The ledger says what was found. The run is compared with one without faults, by a fingerprint of weights and moments
after every step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.harness.benchmark import Benchmark, Results, Steps, option
from benchmarks.harness.processes import ckptless_run, scratch
from benchmarks.harness.scenario import OURS, Scenario, events_of, running
from benchmarks.harness.table import Column, Table
from benchmarks.jobs.gpt import GPT
from lightning_ckptless import environment
from lightning_ckptless.protocol.fault_script import Fault, FaultKind, Moment

RANKS = 3
FIRST_STEP, EVERY_STEPS = 4, 3
STEPS_PER_CHECK, STEPS_PER_WRONG = 2, 6
FLIPS_OF_A_RUN, WRONG_OF_A_RUN = 250, 25
"""Faults of one run: the list of all of them is an environment variable, which the kernel limits."""
KINDS = ("parameter", "exp_avg", "exp_avg_sq")
FLIPS_TARGET, WRONG_TARGET = 0.999, 1.0
REPLICAS: dict[str, Any] = {"failure_domain": "rank", "copies": RANKS - 1}
CHECKED = REPLICAS | {
    "replay_check_every": STEPS_PER_CHECK,
    "history": 2,
    "history_every": STEPS_PER_CHECK,
    "max_recoveries_per_hour": 1_000_000,
}
Outcome = dict[str, Any]


def random_flips(count: int, tensors: dict[str, int], draw: random.Random) -> list[Fault]:
    """Return flips at every few steps. Every kind of tensor is hit equally often, and every element of a kind is.

    Args:
        count: number of flips.
        tensors: number of elements of each parameter, by name.
        draw: random generator.
    """
    flips = []
    for index in range(count):
        [name] = draw.choices([*tensors], [*tensors.values()])
        kind = KINDS[index % len(KINDS)]
        tensor = f"parameter/{name}" if kind == "parameter" else f"optimizer/0/{name}/{kind}"
        step, element, bit = FIRST_STEP + EVERY_STEPS * index, draw.randrange(tensors[name]), draw.randrange(32)
        rank = draw.randrange(RANKS)
        flips.append(Fault(FaultKind.FLIP, rank, step, Moment.COMMIT, tensor=tensor, element=element, bit=bit))
    return flips


def random_wrongs(count: int, draw: random.Random) -> list[Fault]:
    """Return ranks that compute wrongly, one after another, in steps that are checked and in others."""
    steps = (FIRST_STEP + STEPS_PER_WRONG * index + draw.randrange(STEPS_PER_CHECK) for index in range(count))
    return [Fault(FaultKind.WRONG, draw.randrange(RANKS), step) for step in steps]


def train(size: str, steps: int, strategy: dict[str, Any], faults: Sequence[Fault]) -> Results:
    """Train once; returns the fingerprint of the last pass over each step of each rank, and events of the ledger."""
    job = OURS.but(size=size, devices=RANKS, steps=steps, strategy_options=strategy)
    scenario = Scenario("audit", ckptless_run(), job, {environment.FAULTS: ",".join(map(str, faults))})
    with scratch() as place, running(scenario, place, "job") as (watch, folder):
        watch.until_end()
        lives = watch.lives.values()
        fingerprints = {f"{life.rank} {step}": found for life in lives for step, found in life.fingerprints.items()}
        return {"fingerprints": fingerprints, **{kind: events_of(folder, kind) for kind in ("divergence", "rewind")}}


def outcome_of(fault: Fault, divergences: Sequence[dict[str, Any]]) -> Outcome:
    """Return what became of a fault: which differences it explains, and whether they name the right rank."""
    if fault.kind is FaultKind.FLIP:
        kind = next(kind for kind in reversed(KINDS) if kind in fault.tensor)
        found = [each for each in divergences if each["step"] == fault.step]
        complete = len(found) == 1
    else:
        # The check of a step comes before it, so a rank that is wrong from a step to check on is found in it; all ranks
        # go back, its steps differ again, and it is replaced.
        kind, reach = "wrong", range(fault.step - 1, fault.step - 1 + STEPS_PER_CHECK)
        first = next((at for at, each in enumerate(divergences) if each["step"] in reach), len(divergences))
        found = list(divergences[first : first + 2])
        complete = [each["consequence"] for each in found] == ["go_back", "replace"]
    named = complete and all(each["wrong"] == [fault.rank] for each in found)
    return {"fault": str(fault), "kind": kind, "found": bool(found), "named": named, "explained": len(found)}


@dataclass
class Audit(Benchmark):
    size: str = option("tiny", "model size")
    flips: int = option(1000, "number of flips", quick=12)
    wrong: int = option(100, "number of ranks that compute wrongly", quick=3)

    def measure(self, results: Results, steps: Steps) -> None:
        draw, tensors = random.Random(1), {n: p.numel() for n, p in GPT(self.size).named_parameters(prefix="model")}
        results.update(faults=[], rewind_s=[], differing_steps=0, steps=0, unexpected=0)
        steps.expect(self.flips + self.wrong)
        for begin in range(0, self.wrong, WRONG_OF_A_RUN):
            self._run(random_wrongs(min(WRONG_OF_A_RUN, self.wrong - begin), draw), CHECKED, results, steps)
        for begin in range(0, self.flips, FLIPS_OF_A_RUN):
            self._run(random_flips(min(FLIPS_OF_A_RUN, self.flips - begin), tensors, draw), REPLICAS, results, steps)

    def _run(self, faults: list[Fault], strategy: dict[str, Any], results: Results, steps: Steps) -> None:
        last = faults[-1].step + STEPS_PER_WRONG
        steps.begin(f"{self.size}: {last} steps without faults")
        right = train(self.size, last, strategy, [])["fingerprints"]
        steps.begin(f"{self.size}: {len(faults)} faults ({faults[0].kind}) in {last} steps")
        found = train(self.size, last, strategy, faults)
        outcomes = [outcome_of(fault, found["divergence"]) for fault in faults]
        results["faults"] += outcomes
        results["unexpected"] += len(found["divergence"]) - sum(each["explained"] for each in outcomes)
        results["rewind_s"] += [rewind["took_s"] for rewind in found["rewind"]]
        results["steps"] += len(right)
        results["differing_steps"] += sum(found["fingerprints"].get(step) != value for step, value in right.items())
        steps.done(len(faults))

    def tables(self, results: Results) -> list[Table]:
        flips, wrong = (
            [each for each in results["faults"] if (each["kind"] == "wrong") is is_wrong] for is_wrong in (False, True)
        )
        rows = [(f"bit of {kind}", [each for each in flips if each["kind"] == kind], FLIPS_TARGET) for kind in KINDS]
        rows += [("any bit", flips, FLIPS_TARGET), ("matrix products of a rank", wrong, WRONG_TARGET)]
        differing = f"{results['differing_steps']} of {results['steps']}"
        notes = [
            f"Differences that no fault explains: {results['unexpected']}",
            f"Steps of all ranks that differ from the run without faults: {differing}",
            *(f"Going back: median {median(times):.3f} s" for times in [results["rewind_s"]] if times),
        ]
        title = f"Silent data corruption in the {self.size} model on {RANKS} ranks"
        return [Table.of(title, [row for row in rows if row[1]], *COLUMNS, notes=notes)]


def share(head: str, name: str) -> Column:
    return Column(head, lambda row: f"{sum(each[name] for each in row[1])} of {len(row[1])}")


def result(row: tuple[str, list[Outcome], float]) -> str:
    part = sum(each["named"] for each in row[1]) / len(row[1])
    return f"{part:.1%}: {'met' if part >= row[2] else 'missed'}"


COLUMNS = (
    Column("wrong", 0),
    share("found", "found"),
    share("rank named", "named"),
    Column("target", 2, ".1%"),
    Column("result", result),
)

if __name__ == "__main__":
    Audit.main()
