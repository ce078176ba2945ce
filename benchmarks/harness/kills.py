"""Jobs whose ranks are killed repeatedly, in blocks that alternate between the compared scenarios."""

from __future__ import annotations

import random
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.processes import OWN_STORE, Command, Launcher, Scratch, job_environment, scratch, torchrun
from benchmarks.harness.report import Default, Results, Steps, add_choice, add_count, console
from benchmarks.harness.watch import START_S, NoRecoveryError, Watch, kill_one
from benchmarks.harness.wire import Inbox
from benchmarks.jobs.job import JobOptions
from lightning_ckptless import environment
from lightning_ckptless.ledger import read_ledger

Kill = dict[str, Any]

STEP_S = 0.05
LONGEST_STEP_S = 2.0
CHECKPOINT_EVERY = 50
"""Steps between two checkpoint files of other tools; kills are spread over that interval."""
TIMEOUT_S = 120.0
LEDGER_S = 10.0


@dataclass(frozen=True)
class Scenario:
    """One way to start a job and to survive a kill.

    Args:
        name: name in the tables.
        command: builds the command line.
        strategy: strategy of the script.
        checkpoint_every: steps between two checkpoint files; 0 for none.
        env: additional environment variables.
        ranks: number of ranks.
        every: minimum steps between two kills.
        strategy_options: options of the script's strategy.
        kills_of_a_job: kills after which a job is started again; 0 for no limit.
    """

    name: str
    command: Launcher
    strategy: str = "ckptless"
    checkpoint_every: int = 0
    env: tuple[tuple[str, str], ...] = ()
    ranks: int = 2
    every: int = CHECKPOINT_EVERY
    strategy_options: dict[str, Any] = field(default_factory=dict)
    kills_of_a_job: int = 0

    def options(self, size: str, root: Path, steps: int = -1) -> JobOptions:
        """Return the options of its job."""
        return JobOptions(
            size, 2, self.strategy, self.strategy_options, self.ranks, steps, self.checkpoint_every, str(root)
        )


def with_files(ranks: int) -> Scenario:
    """Return torchrun with checkpoint files, and with the setting that makes its relaunches work."""
    name = f"torchrun, ddp + ModelCheckpoint({CHECKPOINT_EVERY})"
    return Scenario(name, torchrun, "ddp", CHECKPOINT_EVERY, tuple(OWN_STORE.items()), ranks)


@contextmanager
def job(scenario: Scenario, size: str, place: Scratch, name: str, steps: int = -1) -> Iterator[tuple[Watch, Path]]:
    """Start a job; yields its watch and its folder."""
    folder = place.files / name
    folder.mkdir()
    ours = {environment.RUN_ROOT: str(folder / "runs"), environment.ARENA_DIR: str(place.arenas)}
    with Inbox(place.files / f"{name}.socket") as inbox:
        env = {**job_environment(inbox.path), **ours, **dict(scenario.env)}
        with Command(scenario.command(scenario.options(size, folder, steps)), folder, env) as command:
            yield Watch(inbox, command, scenario.ranks), folder


def block(
    scenario: Scenario, size: str, kills: int, place: Scratch, name: str, chance: random.Random, timeout_s: float
) -> list[Kill]:
    """Start a job, kill ranks of it `kills` times or until it is lost, and end it.

    Returns:
        The result of each kill, with the ledger's `recovery` event under `ledger`.
    """
    found: list[Kill] = []
    with job(scenario, size, place, name) as (watch, folder):
        while len(found) < kills and len(survived(found)) == len(found):
            try:
                kill = kill_one(watch, chance, every_n_steps=scenario.every, within_s=STEP_S, timeout_s=timeout_s)
            except NoRecoveryError as error:
                console.print(f"{scenario.name}: {error}", markup=False)
                kill = {"failed": str(error), "victim": error.victim}
            found.append(kill)
        good = survived(found)
        if scenario.strategy == "ckptless" and len(good) == len(found):
            # A recovery is recorded when its first step is committed, shortly after it is finished.
            with suppress(NoRecoveryError):
                watch.until(lambda _: len(recoveries_of(folder)) >= kills, LEDGER_S, "the ledger's last recovery")
    for kill, account in zip(good, recoveries_of(folder), strict=False):
        kill["ledger"] = account
    return found


def jobs(
    scenario: Scenario, args: Namespace, kills: int, place: Scratch, name: str, chance: random.Random
) -> list[Kill]:
    """Kill ranks `kills` times; start another job when one is lost or has reached its limit, unless it never began."""
    found: list[Kill] = []
    while len(found) < kills and not any("failed" in kill and kill["victim"] is None for kill in found):
        most = min(kills - len(found), scenario.kills_of_a_job or kills)
        found += block(scenario, args.size, most, place, f"{name}-{len(found)}", chance, args.timeout)
    return found


def survived(kills: list[Kill]) -> list[Kill]:
    """Return the kills that the job survived."""
    return [kill for kill in kills if "failed" not in kill]


def recoveries_of(folder: Path) -> list[dict[str, Any]]:
    """Return the fields of the `recovery` events in the ledgers of a folder."""
    paths = sorted(folder.rglob("ledger.jsonl"))
    return [event.fields for path in paths for event in read_ledger(path).events if event.event == "recovery"]


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
                killed = jobs(scenario, args, kills, place, f"{index}-{number}", chance)
                results["kills"][scenario.name] += killed
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
    names = [scenario.name for scenario in scenarios]
    add_choice(parser, "--only", names, "scenarios")


# ---------------------------------------------------------------------- exactness


def reference_of(scenario: Scenario) -> Scenario:
    """Return the job to compare with: Lightning's own `ddp` for all that run a trainer, else the scenario itself."""
    if scenario.strategy == "torchft":
        return scenario
    return Scenario("torchrun, ddp, undisturbed", torchrun, "ddp", ranks=scenario.ranks)


def compare(kills: dict[str, list[Kill]], scenarios: tuple[Scenario, ...], size: str) -> None:
    """Record under `exact`, for every survived kill, whether the fingerprints of all ranks are the expected ones."""
    groups: dict[str, tuple[Scenario, list[Kill]]] = {}
    for scenario in scenarios:
        reference = reference_of(scenario)
        groups.setdefault(reference.strategy, (reference, []))[1].extend(survived(kills.get(scenario.name, [])))
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
    with job(scenario, size, place, f"reference-{scenario.strategy}") as (watch, _):
        lives = watch.until_step(steps, START_S + LONGEST_STEP_S * steps)
        return {step: lives[0].fingerprints[step] for step in range(1, steps + 1)}
