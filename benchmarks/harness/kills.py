"""Jobs whose ranks are killed repeatedly."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.benchmark import console
from benchmarks.harness.scenario import Scenario, events_of
from benchmarks.harness.watch import START_S, Life, NoRecoveryError, Watch

Kill = dict[str, Any]

STEP_S = 0.05
"""Approximate length of a step: kills are spread over it."""
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
        Seconds from the kill to the first step finished by all, CPU seconds of each survivor in that time, replayed
        steps, lost committed steps, the fingerprints of the steps after the recovery, and the moments of the new
        processes in seconds since the kill.

    Raises:
        NoRecoveryError: If the job does not recover in time, or fails soon afterwards.
    """
    # Count from the last recovery: the newest process began with its first step.
    begun = max(life.first_step for life in watch.until_begun())
    watch.until_step(begun - 1 + every_n_steps + chance.randrange(every_n_steps), START_S)
    watch.follow(chance.random() * STEP_S)
    victim, old, dying = chance.randrange(watch.ranks), dict(watch.pids), watch.now()
    last, committed = max(life.last_step for life in dying), max(life.committed for life in dying)
    used_s, killed_at = {pid: cpu_s(pid) for pid in old.values()}, time.time()
    os.kill(old[victim], signal.SIGKILL)

    def recovered(lives: list[Life]) -> bool:
        # The replacement's first step has been finished by all ranks since the kill.
        first = lives[victim].first_step
        again = watch.pids[victim] != old[victim] and first > 0
        return again and all(life.steps.get(first, 0.0) > killed_at for life in lives)

    try:
        lives = watch.until(recovered, timeout_s, f"a step by all ranks after the loss of rank {victim}")
        first, recovered_with = lives[victim].first_step, dict(watch.pids)
        survivors = used_s.keys() & set(recovered_with.values())
        survivor_cpu_s = [cpu_s(pid) - used_s[pid] for pid in survivors]
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
        "survivor_cpu_s": survivor_cpu_s,
        "repeated_steps": last - (first - 1),
        "lost_committed_steps": max(0, committed - (first - 1)),
        "step_s": dying[victim].step_s,
        "fingerprints": fingerprints,
        "ranks": [{name: at - killed_at for name, at in life.moments.items()} for life in new],
    }


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used, with a resolution of 10 ms."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


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


def phase_s(kills: list[Kill], name: str) -> list[float]:
    """Return the seconds of a phase, or of the total, of each kill, according to the ledger."""
    accounts = [kill["ledger"]["phases"] | kill["ledger"] for kill in kills if "ledger" in kill]
    return [account[name] for account in accounts]
