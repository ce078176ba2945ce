"""Jobs whose ranks are killed repeatedly, in blocks that alternate between the compared scenarios."""

from __future__ import annotations

import os
import random
import signal
import time
from argparse import ArgumentParser, Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.harness.processes import Scratch, scratch, torchrun
from benchmarks.harness.report import Default, Results, Steps, add_choice, add_count, console
from benchmarks.harness.scenario import Scenario, events_of, running
from benchmarks.harness.watch import START_S, Life, NoRecoveryError, Watch
from benchmarks.jobs.job import JobOptions

Kill = dict[str, Any]

STEP_S = 0.05
"""Approximate length of a step: kills are spread over it."""
LONGEST_STEP_S = 2.0
TIMEOUT_S = 120.0
LEDGER_S = 10.0
_WITNESSES = 6
"""Steps after a recovery whose fingerprints are compared."""


def kill_one(watch: Watch, chance: random.Random, *, every_n_steps: int, timeout_s: float) -> Kill:
    """Kill a random rank after a random number of steps, at a random moment of the step.

    Args:
        watch: a job that trains until it is ended.
        chance: random generator.
        every_n_steps: the kill comes after at least this many steps and fewer than twice as many, all equally likely.
            If a checkpoint file is written equally often, the kill is equally likely at any distance from the last one.
        timeout_s: longest wait for the recovery, in seconds.

    Returns:
        Seconds from the kill to the first step finished by all, replayed steps, lost committed steps, the fingerprints
        of the steps after the recovery, and the moments of the new processes in seconds since the kill.

    Raises:
        NoRecoveryError: If the job does not recover in time, or fails soon afterwards.
    """
    # Count from the last recovery: the newest process began with its first step.
    begun = max(life.first_step for life in watch.until_begun())
    watch.until_step(begun - 1 + every_n_steps + chance.randrange(every_n_steps), START_S)
    watch.follow(chance.random() * STEP_S)
    victim, old, dying = chance.randrange(watch.ranks), dict(watch.pids), watch.now()
    last, committed = max(life.last_step for life in dying), max(life.committed for life in dying)
    killed_at = time.time()
    os.kill(old[victim], signal.SIGKILL)

    def recovered(lives: list[Life]) -> bool:
        # The replacement's first step has been finished by all ranks since the kill.
        first = lives[victim].first_step
        again = watch.pids[victim] != old[victim] and first > 0
        return again and all(life.steps.get(first, 0.0) > killed_at for life in lives)

    try:
        lives = watch.until(recovered, timeout_s, f"a step by all ranks after the loss of rank {victim}")
        first, recovered_with = lives[victim].first_step, dict(watch.pids)
        ended_at = max(life.steps[first] for life in lives)
        witnesses = range(first, first + _WITNESSES)
        lives = watch.until_step(witnesses[-1], timeout_s)
        require_same_processes(watch, recovered_with, first)
        fingerprints = {step: sorted({life.fingerprints[step] for life in lives}) for step in witnesses}
    except NoRecoveryError as error:
        raise NoRecoveryError(str(error), victim) from error
    new = [life for rank, life in enumerate(lives) if watch.pids[rank] != old[rank]]
    return {
        "victim": victim,
        "killed_at": killed_at,
        "seconds": ended_at - killed_at,
        "repeated_steps": last - (first - 1),
        "lost_committed_steps": max(0, committed - (first - 1)),
        "step_s": dying[victim].step_s,
        "fingerprints": fingerprints,
        "ranks": [{name: at - killed_at for name, at in life.moments.items()} for life in new],
    }


def require_same_processes(watch: Watch, before: dict[int, int], step: int) -> None:
    """Check that no rank has been replaced since a recovery, although none was killed.

    Args:
        watch: the job.
        before: process of each rank when the recovery ended.
        step: step with which it ended.

    Raises:
        NoRecoveryError: If one was: this counts as a kill that the job did not survive.
    """
    for rank, pid in before.items():
        if watch.pids[rank] != pid:
            again = watch.lives[watch.pids[rank]].first_step
            said = watch.command.output_tail()
            raise NoRecoveryError(f"rank {rank} was replaced at step {again}, soon after step {step}:\n{said}")


def survived(kills: list[Kill]) -> list[Kill]:
    """Return the kills that the job survived."""
    return [kill for kill in kills if "failed" not in kill]


def kill_repeatedly(
    watch: Watch, folder: Path, scenario: Scenario, kills: int, chance: random.Random, timeout_s: float
) -> list[Kill]:
    """Kill ranks of a job `kills` times or until it is lost.

    Returns:
        The result of each kill, with the ledger's `recovery` event under `ledger`.
    """
    found: list[Kill] = []
    while len(found) < kills and len(survived(found)) == len(found):
        try:
            found.append(kill_one(watch, chance, every_n_steps=scenario.every, timeout_s=timeout_s))
        except NoRecoveryError as error:
            console.print(f"{scenario.name}: {error}", markup=False)
            found.append({"failed": str(error), "victim": error.victim})
    good = survived(found)
    if scenario.job.strategy == "ckptless" and len(good) == len(found):
        # A recovery is recorded when its first step is committed, shortly after it is finished.
        awaited = "the ledger's last recovery"
        with suppress(NoRecoveryError):
            watch.until(lambda _: len(events_of(folder, "recovery")) >= kills, LEDGER_S, awaited)
    for kill, account in zip(good, events_of(folder, "recovery"), strict=False):
        kill["ledger"] = account
    return found


def jobs(
    scenario: Scenario, args: Namespace, kills: int, place: Scratch, name: str, chance: random.Random
) -> list[Kill]:
    """Kill ranks `kills` times; start another job when one is lost or has reached its limit, unless it never began."""
    found: list[Kill] = []
    while len(found) < kills and not any("failed" in kill and kill["victim"] is None for kill in found):
        most = min(kills - len(found), scenario.kills_of_a_job or kills)
        with running(scenario, place, f"{name}-{len(found)}", size=args.size) as (watch, folder):
            found += kill_repeatedly(watch, folder, scenario, most, chance, args.timeout)
    return found


def measure(args: Namespace, results: Results, steps: Steps, every_scenario: tuple[Scenario, ...]) -> None:
    """Kill a rank `args.repeats` times in each scenario, in alternating blocks."""
    chance = random.Random(args.seed)
    scenarios = [scenario for scenario in every_scenario if not args.only or scenario.name in args.only]
    results["kills"] = {scenario.name: [] for scenario in scenarios}
    steps.expect(len(scenarios) * args.repeats)
    with scratch() as place:
        for number, begin in enumerate(range(0, args.repeats, args.block)):
            kills = min(args.block, args.repeats - begin)
            for index, scenario in enumerate(scenarios):
                steps.begin(scenario.name)
                results["kills"][scenario.name] += jobs(scenario, args, kills, place, f"{index}-{number}", chance)
                steps.done(kills)


def add_options(
    parser: ArgumentParser, scenarios: tuple[Scenario, ...], *, repeats: int, block: int, size: str = "1M"
) -> None:
    """Add the options of a program that kills ranks, with defaults for kills, their blocks and the size."""
    add_count(parser, "--repeats", Default(repeats, 2), "kills in each scenario")
    add_count(parser, "--block", block, "consecutive kills in a scenario")
    about = "seconds after a kill until a job counts as lost (default: %(default)g)"
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help=about)
    parser.add_argument("--size", default=size, help="model size (default: %(default)s)")
    add_count(parser, "--seed", 1, "seed of the moments and victims")
    add_choice(parser, "--only", [scenario.name for scenario in scenarios], "scenarios")


# ---------------------------------------------------------------------- exactness


def reference_of(scenario: Scenario) -> Scenario:
    """Return the job to compare with: Lightning's own `ddp` for all that run a trainer, else the scenario itself."""
    if scenario.job.strategy == "torchft":
        return scenario
    return Scenario("torchrun, ddp, undisturbed", torchrun, JobOptions(strategy="ddp", devices=scenario.job.devices))


def compare(kills: dict[str, list[Kill]], scenarios: tuple[Scenario, ...], size: str) -> None:
    """Record under `exact`, for every survived kill, whether the fingerprints of all ranks are the expected ones."""
    groups: dict[str, tuple[Scenario, list[Kill]]] = {}
    for scenario in scenarios:
        reference = reference_of(scenario)
        groups.setdefault(reference.job.strategy, (reference, []))[1].extend(survived(kills.get(scenario.name, [])))
    with scratch() as place:
        for reference, good in groups.values():
            if not good:
                continue
            last = max(max(kill["fingerprints"]) for kill in good)
            try:
                right = undisturbed(reference, size, last, place)
            except NoRecoveryError as error:
                console.print(f"nothing to compare with, the undisturbed run failed: {error}", markup=False)
                continue
            for kill in good:
                kill["exact"] = is_exact(kill["fingerprints"], right)


def is_exact(seen: dict[int, list[int]], right: dict[int, int]) -> bool:
    """Return whether all ranks had the expected fingerprint after each of the steps."""
    return all(values == [right[step]] for step, values in seen.items())


def undisturbed(scenario: Scenario, size: str, steps: int, place: Scratch) -> dict[int, int]:
    """Return the fingerprints of an undisturbed job, by step."""
    with running(scenario, place, f"reference-{scenario.job.strategy}", size=size) as (watch, _):
        return watch.until_step(steps, START_S + LONGEST_STEP_S * steps)[0].fingerprints
