"""A scenario on one node: the agent runs in this process, its workers are forks of the shared fork server."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

from benchmarks.harness.processes import ENVIRONMENT
from benchmarks.soak.bounds import bounds_s, deadline_s, silent_s
from benchmarks.soak.evidence import commits_of, lost_steps, outcome_of, recoveries_of, times_of
from benchmarks.soak.outside import Action, OutsideFaults, fill_disk, flip_bytes, limit_memory, send, sidecar_of
from benchmarks.soak.processes import busy_cores, left_over
from benchmarks.soak.results import Result
from benchmarks.soak.scenario import OutsideFault, OutsideKind, Scenario
from benchmarks.soak.stage import Place, Undisturbed, open_files, place_for, temporary_files_in
from benchmarks.soak.stuck import dump_before
from benchmarks.soak.watching import View, Watch
from lightning_ckptless import environment
from lightning_ckptless.errors import TimeLimitError
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.testing.compare import compare
from lightning_ckptless.testing.drill import Ladder, Progress, Variant, run_variant
from lightning_ckptless.testing.fault_marks import FaultMarks
from tests.faults.conftest import command_for
from tests.lab.parts import Options


def options_of(scenario: Scenario, place: Place) -> Options:
    """Return the options of the test script for the run with faults."""
    configuration = scenario.configuration
    chosen = configuration.strategy_options
    if configuration.durable:
        chosen["durable_dir"] = str(place.disk / "durable")
    return replace(
        configuration.undisturbed,
        strategy_options=repr(chosen),
        slow_mirror_s=configuration.slow_mirror_s,
        commits=str(place.commits.absolute()),
    )


def run(
    scenario: Scenario,
    folder: Path,
    parent: ForkServer,
    undisturbed: Undisturbed,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Run a scenario and evaluate it.

    Args:
        scenario: scenario to run.
        folder: folder for its files; removed if the run passes.
        parent: fork server that all runs share.
        undisturbed: runs to compare with.
        progress: receives the progress of the run.
    """
    right = undisturbed.run(scenario.configuration.undisturbed)
    parent.ready()
    began, files_before = time.monotonic(), open_files()
    with place_for(folder) as place:
        struck_run, struck = _strike(scenario, place, parent, progress)
        leaks = left_over([pid for pid in [parent.pid] if pid is not None])
        leaks += [f"shared memory {path.name}" for path in place.arenas.iterdir()]
        leaks += [f"temporary {path.name}" for path in place.temporary.glob("ckptless-*")]
    leaks += [f"{count} open: {what}" for what, count in (open_files() - files_before).items()]
    result = _judge(scenario, right, struck_run, struck, leaks, place)
    result = replace(result, wall_s=round(time.monotonic() - began, 2))
    if not result.good:
        return replace(result, folder=str(folder))
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _strike(
    scenario: Scenario, place: Place, parent: ForkServer, progress: Callable[[Progress], None] | None
) -> tuple[Variant | None, list[str]]:
    """Run it with its faults; returns the run (None if it missed its deadline) and the injected outside faults."""
    options, folder = options_of(scenario, place), place.files / "run"
    env = ENVIRONMENT | {environment.ARENA_DIR: str(place.arenas)}
    outside = OutsideFaults(scenario.outside, Watch(folder / "runs", place.commits), _actions(place, parent, scenario))
    with (
        (place.files / "agent.log").open("w") as log,
        redirect_stderr(log),
        temporary_files_in(place.temporary),
        busy_cores(scenario.load),
        dump_before(
            deadline_s(scenario), Watch(folder / "runs", place.commits), place.temporary, place.files / "stuck"
        ),
        outside,
    ):
        try:
            found = run_variant(
                command_for(options),
                folder,
                faults=",".join(map(str, scenario.injected)),
                nproc=options.devices,
                parent=parent,
                isolate=True,
                env=env,
                ladder=Ladder(max_restarts=100),
                timeout_s=deadline_s(scenario),
                progress=progress,
            )
        except TimeLimitError:
            found = None
    return found, outside.struck


def _actions(place: Place, parent: ForkServer, scenario: Scenario) -> dict[OutsideKind, Action]:
    """Return the action of each kind of outside fault."""
    chance = random.Random(f"bytes {scenario.seed}")

    def to_rank(number: signal.Signals) -> Action:
        return lambda fault, view: send(view.pids.get(fault.rank), number)

    def flip(fault: OutsideFault, view: View) -> bool:
        # The source rank would overwrite the damage: it is killed, so that the copy is needed.
        return flip_bytes(place.arenas, fault.rank, chance) and send(view.pids.get(fault.rank), signal.SIGKILL)

    return {
        OutsideKind.KILL: to_rank(signal.SIGKILL),
        OutsideKind.STOP: to_rank(signal.SIGSTOP),
        OutsideKind.CRASH: to_rank(signal.SIGSEGV),
        OutsideKind.FLIP: flip,
        OutsideKind.MEMORY: lambda fault, view: limit_memory(view.pids.get(fault.rank)),
        OutsideKind.STANDBY: lambda _, view: send(next(iter(view.standbys), None), signal.SIGKILL),
        OutsideKind.FORK_SERVER: lambda *_: send(parent.pid, signal.SIGKILL),
        OutsideKind.SIDECAR: lambda _, view: send(
            sidecar_of(parent.pid, [*view.pids.values(), *view.standbys]), signal.SIGKILL
        ),
        OutsideKind.DISK_FULL: lambda *_: fill_disk(place.disk),
    }


def _judge(
    scenario: Scenario, right: Variant, found: Variant | None, struck: list[str], leaks: list[str], place: Place
) -> Result:
    folder = place.files / "run"
    variant = found or Variant(folder, 1, 0.0)
    events, run_folder = variant.events, variant.run_folder
    happened = FaultMarks.claimed(run_folder / "faults") if run_folder else frozenset()
    recoveries = recoveries_of(events)
    verdict = compare(right.folder, folder) if found is not None and not found.exit_code else None
    lost = lost_steps(commits_of(place.commits), events)
    outcome, why = outcome_of(
        exit_code=None if found is None else found.exit_code,
        identical=verdict is not None and verdict.identical,
        lost=lost,
        leaks=leaks,
        late=times_of(recoveries, bounds_s(scenario), silent_s(scenario)),
    )
    if outcome == "different":
        why = str(verdict)
    elif outcome == "ended":
        why += f"; end of its output: {variant.tail(8)}"
    return Result(
        seed=scenario.seed,
        configuration=str(scenario.configuration),
        load=scenario.load,
        asked=scenario.faults,
        struck=(*(str(scenario.injected[index]) for index in sorted(happened)), *struck),
        outcome=outcome,
        why=why,
        lost_steps=lost,
        recoveries=tuple(recoveries),
        leaks=tuple(leaks),
        left_out=() if place.has_own_disk or not _fills(scenario) else ("disk_full: no disk can be mounted",),
    )


def _fills(scenario: Scenario) -> bool:
    return any(fault.kind is OutsideKind.DISK_FULL for fault in scenario.outside)
