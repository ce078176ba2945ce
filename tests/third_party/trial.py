"""Runs of one project: under DDP, undisturbed, with injected kills, and with a SIGKILL from outside."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import usual_modules
from lightning_ckptless.testing.compare import compare
from lightning_ckptless.testing.drill import Progress, Variant, run_drill, run_variant
from tests.third_party.projects import Project
from tests.third_party.weights import read_weights

REPOSITORY = Path(__file__).parents[2]
RANKS = 2
TIMEOUT_S = 900.0
ENVIRONMENT = {
    "PYTHONPATH": str(REPOSITORY),
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def parent_of(project: Project) -> ForkServer:
    """Return a fork server that has the top-level imports of the project's program, for all its runs."""
    modules = (*usual_modules([str(project.path)]), *imports_of(project.path))
    return ForkServer(modules, path=(str(REPOSITORY),))


def imports_of(program: Path) -> Iterator[str]:
    """Return the modules that a file imports at the top level."""
    for node in ast.parse(program.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


class Trial:
    """Runs the program of a project in each way.

    Args:
        project: the project.
        folder: an empty folder; receives a folder per run.
        parent: the fork server of all runs with our strategy.
    """

    def __init__(self, project: Project, folder: Path, parent: ForkServer) -> None:
        self.project = project
        self.folder = folder
        self._parent = parent
        self._command = [str(project.path), "ckptless"]

    @cached_property
    def undisturbed(self) -> Variant:
        """The undisturbed run with our strategy."""
        return self._run("undisturbed")

    def plain(self) -> list[str]:
        """Return the differences between the undisturbed run and the run under Lightning's DDP."""
        folder = self.folder / "ddp"
        folder.mkdir()
        with (folder / "output").open("wb") as output:
            words = [sys.executable, str(self.project.path), self.project.ddp]
            environment = os.environ | ENVIRONMENT
            code = subprocess.run(
                words, cwd=folder, env=environment, stdout=output, stderr=output, timeout=TIMEOUT_S, check=False
            ).returncode
        if code:
            return [f"exit code {code} under {self.project.ddp}: {_tail_of(folder / 'output')}"]
        return self._failure(self.undisturbed) or [
            *_faults(self.undisturbed),
            *_differences(folder, self.undisturbed.folder / "cwd"),
        ]

    def injected(self) -> list[str]:
        """Return the problems found by the drill with the project's faults."""
        if failure := self._failure(self.undisturbed):
            return failure
        report = run_drill(
            self._command,
            self.project.faults,
            folder=self.folder / "injected",
            nproc=RANKS,
            parent=self._parent,
            baseline=self.undisturbed,
            isolate=True,
            env=ENVIRONMENT,
            timeout_s=TIMEOUT_S,
        )
        weights = _differences(self.undisturbed.folder / "cwd", report.faulted.folder / "cwd")
        return [*report.problems, *weights]

    def outside(self) -> list[str]:
        """Return the differences between the run with a SIGKILL from outside and the undisturbed run."""
        if failure := self._failure(self.undisturbed):
            return failure
        folder = self.folder / "outside"
        killer = OutsideKill(folder, self.project)
        killed = self._run("outside", killer)
        if failure := self._failure(killed):
            return failure
        verdict = compare(self.undisturbed.folder, folder)
        recoveries = [event for event in killed.events if event.event == "recovery"]
        return [
            *([] if killer.pid else [f"rank {self.project.victim} was not killed: no step after {killer.after}"]),
            *([] if recoveries or not killer.pid else ["the ledger has no recovery"]),
            *([] if verdict.identical else [str(verdict)]),
            *_differences(self.undisturbed.folder / "cwd", folder / "cwd"),
        ]

    def _run(self, name: str, progress: OutsideKill | None = None) -> Variant:
        return run_variant(
            self._command,
            self.folder / name,
            nproc=RANKS,
            parent=self._parent,
            isolate=True,
            env=ENVIRONMENT,
            timeout_s=TIMEOUT_S,
            progress=progress,
        )

    @staticmethod
    def _failure(variant: Variant) -> list[str]:
        if not variant.exit_code:
            return []
        return [f"the run `{variant.folder.name}` ended with exit code {variant.exit_code}: {variant.tail()}"]


class OutsideKill:
    """Kills a rank once it has reached a step, by its process id in the ledger.

    Args:
        folder: folder of the run.
        project: defines the rank and the step.

    Attributes:
        pid: the killed process; None before.
        after: the step that the run had last reached.
    """

    def __init__(self, folder: Path, project: Project) -> None:
        self._variant = Variant(folder, 0, 0.0)
        self._project = project
        self.pid: int | None = None
        self.after = 0

    def __call__(self, progress: Progress) -> None:
        """Kill the rank if the run has reached the step."""
        self.after = progress.step
        if self.pid is not None or progress.done or progress.step < self._project.killed_from:
            return
        spawned = [event for event in self._variant.events if event.event == "workers_spawned"]
        pid = int(spawned[-1].fields["pids"][str(self._project.victim)])
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.pid = pid


def _faults(undisturbed: Variant) -> list[str]:
    faults = [event.fields for event in undisturbed.events if event.event == "fault"]
    return [f"a rank failed without an injected fault: {fault}" for fault in faults]


def _differences(expected: Path, found: Path) -> list[str]:
    right, other = read_weights(expected), read_weights(found)
    if not right:
        return [f"no weights were recorded in {expected}"]
    return [] if right == other else [f"the final weights differ: expected {right}, found {other}"]


def _tail_of(output: Path, lines: int = 20) -> str:
    return "\n".join(output.read_text(errors="replace").splitlines()[-lines:])
