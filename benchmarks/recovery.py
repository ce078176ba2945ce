"""SIGKILL of one rank to the first step that all ranks have finished: every kind of recovery, and other tools.

A small GPT trains on CPU ranks. A random rank, which may be rank 0, is killed repeatedly at random moments. All rows
are measured in one run, in alternating blocks. torchft and NVIDIA's resiliency extension are included if `make
bench-rivals` has installed them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks import rivals
from benchmarks.harness.benchmark import Benchmark, Results, Steps, console, option
from benchmarks.harness.kills import Kill, kill_repeatedly, phase_s, survived
from benchmarks.harness.processes import Scratch, ckptless_run, scratch, torchrun
from benchmarks.harness.scenario import OURS, Scenario, running
from benchmarks.harness.table import Column, Group, Table, count_of, each, p95, percentile, verdict
from benchmarks.harness.watch import START_S, NoRecoveryError
from benchmarks.jobs.job import JobOptions

RANKS, EVERY = 4, 20
CHECKPOINT_EVERY = 50
"""Steps between two checkpoint files of other tools; kills are spread over that interval."""
BLOCK = 6
"""Consecutive kills in a scenario."""
TIMEOUT_S, LONGEST_STEP_S = 120.0, 2.0
JOB = OURS.but(devices=RANKS)
FILES = JobOptions(strategy="ddp", checkpoint_every=CHECKPOINT_EVERY, devices=RANKS)
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Setting with which relaunched workers of torchrun do not read the addresses of killed ones."""
ours = partial(Scenario, job=JOB, every=EVERY)
STANDBY, IN_PLACE = "in place, standby", "in place, new process"
RELAUNCH, FRESH = "relaunch, preloaded", "relaunch, new interpreters"
SCENARIOS = (
    ours(STANDBY, ckptless_run(), job=JOB.but(strategy_options={"standbys": 1})),
    ours(IN_PLACE, ckptless_run()),
    ours(RELAUNCH, ckptless_run("--no-in-place")),
    ours(FRESH, ckptless_run("--no-in-place", "--no-preload")),
    ours("torchrun, ckptless", torchrun),
    Scenario(f"torchrun, ddp + ModelCheckpoint({CHECKPOINT_EVERY})", torchrun, FILES, OWN_STORE, CHECKPOINT_EVERY),
)
RIVALS = (
    f"nvidia-resiliency-ext in process, ddp + ModelCheckpoint({CHECKPOINT_EVERY})",
    "torchft, with its gradient hook patched",
)


def rivals_in(python: Path) -> tuple[Scenario, ...]:
    """Return the jobs of both rivals, in an environment."""
    command = partial(rivals.command, python=python)
    nvrx, torchft = FILES.but(strategy="nvrx"), JobOptions(strategy="torchft", devices=RANKS)
    return (
        Scenario(RIVALS[0], command, nvrx, rivals.VARIABLES, CHECKPOINT_EVERY, kills_of_a_job=1),
        Scenario(RIVALS[1], command, torchft, rivals.VARIABLES, EVERY),
    )


# ---------------------------------------------------------------------- tables


def own_share_s(kill: Kill) -> float | None:
    """Return the seconds of a recovery without the start of the slowest process and its imports.

    They are the time from the kill to the request for new processes, and from the end of the script's imports to the
    first step. The rest would pass with any launcher.
    """
    if "ledger" not in kill:
        return None
    spawned_s = kill["ledger"]["spawned_at"] - kill["killed_at"]
    return float(kill["seconds"] - (max(rank["imported"] for rank in kill["ranks"]) - spawned_s))


def beyond_step_s(kill: Kill) -> float:
    """Return the seconds of a recovery in addition to the step that it ends with."""
    return float(kill["seconds"] - kill["step_s"])


TARGETS: dict[str, tuple[str, Callable[[Kill], float | None], dict[int, float]]] = {
    STANDBY: (", in addition to one step", beyond_step_s, {50: 0.12, 95: 0.25}),
    IN_PLACE: (", in addition to one step", beyond_step_s, {50: 0.2}),
    RELAUNCH: ("", lambda kill: float(kill["seconds"]), {50: 1.0, 95: 2.0}),
    FRESH: (", without process start and imports", own_share_s, {50: 0.3}),
}
"""By row: the quantity that is compared, and the targets of its percentiles in s."""


def verdicts(groups: Sequence[Group]) -> Iterator[str]:
    """Yield the comparisons with the targets, in words."""
    for group in (group for group in groups if group.name in TARGETS):
        what, quantity, targets = TARGETS[group.name]
        values = [value for kill in group.items if (value := quantity(kill)) is not None]
        for percent, target_s in targets.items() if values else ():
            yield f"{group.name}{what}, p{percent}: {verdict(percentile(values, percent), target_s, 's')}"


def exact(group: Group) -> str | None:
    compared = [kill["exact"] for kill in group.items if "exact" in kill]
    return f"{sum(compared)} of {len(compared)}" if compared else None


def rank_0_survived(group: Group) -> str:
    found = [kill for kill in group.context if kill.get("victim") == 0]
    return f"{len(survived(found))} of {len(found)}"


def lost_steps(group: Group) -> list[float]:
    """Return the lost committed steps of each kill; without our strategy none are committed."""
    return [] if "ddp" in group.name else each("lost_committed_steps")(group)


KILLS = (
    Column("how", 0),
    Column("kills", lambda group: len(group.context)),
    Column("survived", count_of),
    Column("p50 s", each("seconds"), ".2f", median),
    Column("p95 s", each("seconds"), ".2f", p95),
    Column("max s", each("seconds"), ".2f", max),
    Column("one step s", each("step_s"), ".2f", median),
    Column("steps replayed p50", each("repeated_steps"), "g", median),
    Column("max", each("repeated_steps"), "g", max),
    Column("committed steps lost", lost_steps, of=sum),
    Column("exact", exact),
    Column("rank 0 survived", rank_0_survived),
)
KILLS_NOTE = (
    "Steps replayed are steps that had been finished. A committed step is one that a rank has seen committed on all "
    "ranks. Exact: in the steps after the recovery, a checksum of weights and moments on all ranks equals that of the "
    "same step of an undisturbed run. The drill compares every bit."
)
PHASES = ("detect_s", "abort_s", "regroup_s", "restore_s", "replay_s", "other_s", "total_s")
PHASES_NOTE = (
    "In place: detect ends when the agent has seen the exit, abort when the reporting rank has been notified, regroup "
    "when all ranks have met, restore when the state is in place, replay when the first new step is committed. "
    "Relaunch: abort ends when the survivors have exited, and regroup includes start and imports. torchrun's agent "
    "does not report exit times: its detection and stopping belong to no phase."
)


def phase(name: str) -> Column:
    return Column(name.removesuffix("_s"), lambda group: phase_s(group.items, name), ".3f", median)


# ---------------------------------------------------------------------- measurement


def jobs(scenario: Scenario, size: str, kills: int, place: Scratch, name: str, chance: random.Random) -> list[Kill]:
    """Kill ranks `kills` times; start another job when one is lost or has reached its limit, unless it never began."""
    found: list[Kill] = []
    while len(found) < kills and not any("failed" in kill and kill["victim"] is None for kill in found):
        most = min(kills - len(found), scenario.kills_of_a_job or kills)
        with running(scenario, place, f"{name}-{len(found)}", size=size) as (watch, folder):
            found += kill_repeatedly(watch, folder, scenario, most, chance, TIMEOUT_S)
    return found


def reference_of(scenario: Scenario) -> Scenario:
    """Return the job to compare with: Lightning's own `ddp` for all that run a trainer, else the scenario itself."""
    if scenario.job.strategy == "torchft":
        return scenario
    return Scenario("torchrun, ddp, undisturbed", torchrun, JobOptions(strategy="ddp", devices=RANKS))


def compare(kills: dict[str, list[Kill]], scenarios: Sequence[Scenario], size: str) -> None:
    """Record under `exact`, for every survived kill, whether the fingerprints of all ranks are the expected ones."""
    groups: dict[str, tuple[Scenario, list[Kill]]] = {}
    for scenario in scenarios:
        reference = reference_of(scenario)
        groups.setdefault(reference.job.strategy, (reference, []))[1].extend(survived(kills[scenario.name]))
    with scratch() as place:
        for reference, good in (group for group in groups.values() if group[1]):
            last = max(max(kill["fingerprints"]) for kill in good)
            try:
                with running(reference, place, reference.job.strategy, size=size) as (watch, _):
                    right = watch.until_step(last, START_S + LONGEST_STEP_S * last)[0].fingerprints
            except NoRecoveryError as error:
                console.print(f"nothing to compare with, the undisturbed run failed: {error}", markup=False)
                continue
            for kill in good:
                kill["exact"] = all(seen == [right[step]] for step, seen in kill["fingerprints"].items())


@dataclass
class Recovery(Benchmark):
    repeats: int = option(30, "kills in each scenario", quick=2)
    size: str = option("1M", "model size")
    only: tuple[str, ...] = option((), "scenarios", choices=(*(scenario.name for scenario in SCENARIOS), *RIVALS))
    rivals_python: str = option(str(rivals.PYTHON), "Python of the environment that `make bench-rivals` sets up")

    def measure(self, results: Results, steps: Steps) -> None:
        chance, python = random.Random(1), Path(self.rivals_python).absolute()
        results["rivals"] = rivals.versions(python)
        known = (*SCENARIOS, *(rivals_in(python) if results["rivals"] else ()))
        scenarios = [scenario for scenario in known if not self.only or scenario.name in self.only]
        results["kills"] = {scenario.name: [] for scenario in scenarios}
        steps.expect(len(scenarios) * self.repeats)
        with scratch() as place:
            for begin in range(0, self.repeats, BLOCK):
                kills = min(BLOCK, self.repeats - begin)
                for index, scenario in enumerate(scenarios):
                    steps.begin(scenario.name)
                    name = f"{index}-{begin}"
                    results["kills"][scenario.name] += jobs(scenario, self.size, kills, place, name, chance)
                    steps.done(kills)
        steps.begin("undisturbed jobs to compare with")
        compare(results["kills"], scenarios, self.size)

    def tables(self, results: Results) -> list[Table]:
        groups = [Group(name, survived(found), found) for name, found in results["kills"].items()]
        recovered = [group for group in groups if any("ledger" in kill for kill in group.items)]
        notes = [*verdicts(groups), KILLS_NOTE]
        if installed := results["rivals"]:
            notes.append("Other tools: " + ", ".join(map(" ".join, installed.items())) + ".")
        kills = f"SIGKILL of one of {RANKS} ranks to the first step finished by all"
        phases = "Phases according to the ledger, medians in s"
        return [
            Table.of(kills, groups, *KILLS, notes=notes),
            Table.of(phases, recovered, Column("how", 0), *map(phase, PHASES), notes=[PHASES_NOTE]),
        ]


if __name__ == "__main__":
    Recovery.main()
