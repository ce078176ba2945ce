"""A scenario on one node: the agent runs in this process, its workers are forks of the shared fork server."""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from pathlib import Path

from benchmarks.harness.processes import ENVIRONMENT
from lightning_ckptless import environment
from lightning_ckptless.errors import TimeLimitError
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.worker.progress import STACKS_SIGNAL
from lightning_ckptless.testing.compare import compare
from lightning_ckptless.testing.drill import Ladder, Variant, run_variant
from lightning_ckptless.testing.fault_marks import FaultMarks
from tests.faults.conftest import command_for
from tests.lab.parts import Options
from tests.soak.judge import Evidence, deadline_s, lost_steps
from tests.soak.outside import (
    Action,
    View,
    Watch,
    commits_of,
    fill_disk,
    flip_bytes,
    limit_memory,
    outside_faults,
    send,
    sidecar_of,
)
from tests.soak.scenario import OutsideFault, OutsideKind, Scenario
from tests.soak.stage import Place, Undisturbed

BEFORE_S = 10.0
"""Seconds before the deadline at which the workers write their stacks; afterwards they no longer exist."""
WRITE_S = 3.0


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


def prepare(scenario: Scenario, place: Place, parent: ForkServer, undisturbed: Undisturbed) -> Callable[[], Evidence]:
    """Make the undisturbed run, and return the function that makes the run with faults."""
    right = undisturbed.run(scenario.configuration.undisturbed)

    def strike() -> Evidence:
        run, struck = _strike(scenario, place, parent)
        return _evidence(scenario, place, right, run, struck)

    return strike


def _strike(scenario: Scenario, place: Place, parent: ForkServer) -> tuple[Variant | None, list[str]]:
    """Run it with its faults; returns the run (None if it missed its deadline) and the injected outside faults."""
    options, folder, limit_s = options_of(scenario, place), place.files / "run", deadline_s(scenario)
    watch, at_the_end = (Watch(folder / "runs", place.commits) for _ in range(2))
    with (
        (place.files / "agent.log").open("w") as log,
        redirect_stderr(log),
        _temporary_files_in(place.temporary),
        _stacks_before(limit_s, at_the_end, place),
        outside_faults(scenario.outside, watch, _actions(place, parent, scenario)) as struck,
    ):
        try:
            found = run_variant(
                command_for(options),
                folder,
                faults=",".join(map(str, scenario.injected)),
                nproc=options.devices,
                parent=parent,
                isolate=True,
                env=ENVIRONMENT | {environment.ARENA_DIR: str(place.arenas)},
                ladder=Ladder(max_restarts=100),
                timeout_s=limit_s,
            )
        except TimeLimitError:
            found = None
    return found, struck


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


def _evidence(scenario: Scenario, place: Place, right: Variant, run: Variant | None, struck: list[str]) -> Evidence:
    variant = run or Variant(place.files / "run", 1, 0.0)
    run_folder = variant.run_folder
    happened = FaultMarks.claimed(run_folder / "faults") if run_folder else frozenset[int]()
    comparison = compare(right.folder, variant.folder) if not variant.exit_code else None
    fills = any(fault.kind is OutsideKind.DISK_FULL for fault in scenario.outside)
    return Evidence(
        exit_code=None if run is None else run.exit_code,
        identical=comparison is not None and comparison.identical,
        events=variant.events,
        struck=(*(str(scenario.injected[index]) for index in sorted(happened)), *struck),
        lost=lost_steps(commits_of(place.commits), variant.events),
        difference=str(comparison),
        why=f"end of its output: {variant.tail(8)}" if variant.exit_code else "",
        left_out=("disk_full: no disk can be mounted",) if fills and not place.has_own_disk else (),
    )


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Create this process's temporary files in a folder, so that leaked ones can be found."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def _stacks_before(limit_s: float, watch: Watch, place: Place) -> Iterator[None]:
    """Keep the stacks of the workers shortly before a run misses its deadline, unless the block ends earlier."""

    def keep() -> None:
        for pid in filter(_handles_stacks, watch.look().pids.values()):
            send(pid, STACKS_SIGNAL)
        threading.Event().wait(WRITE_S)
        (place.files / "stuck").mkdir(exist_ok=True)
        for path in place.temporary.glob("ckptless-scratch-agent-*/*"):
            with suppress(OSError):
                shutil.copy(path, place.files / "stuck" / path.name)

    timer = threading.Timer(limit_s - BEFORE_S, keep)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _handles_stacks(pid: int) -> bool:
    """Return whether a process has a handler of the signal; without one, the signal would end it."""
    with suppress(OSError):
        status = Path("/proc", str(pid), "status").read_text().splitlines()
        caught = next(line.split()[1] for line in status if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (STACKS_SIGNAL - 1) & 1)
    return False
