"""Scenarios: ways to start a job. A started one is followed by the notes of its processes, and by its ledger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.processes import OWN_STORE, Command, Launcher, Scratch, job_environment, torchrun
from benchmarks.harness.watch import Watch
from benchmarks.harness.wire import Inbox
from benchmarks.jobs.job import JobOptions
from lightning_ckptless import environment
from lightning_ckptless.ledger import LEDGER_NAME, read_ledger

CHECKPOINT_EVERY = 50
"""Steps between two checkpoint files of other tools; kills are spread over that interval."""


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


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the fields of the events of a kind in the ledgers of a folder."""
    paths = sorted(folder.rglob(LEDGER_NAME))
    return [dict(event.fields) for path in paths for event in read_ledger(path, only=kind)]
