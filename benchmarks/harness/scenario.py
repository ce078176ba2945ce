"""Scenarios: ways to start a job. A started one is followed by the notes of its processes, and by its ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.processes import Command, Launcher, Scratch, job_environment
from benchmarks.harness.watch import Watch
from benchmarks.harness.wire import Inbox
from benchmarks.jobs.job import JobOptions
from lightning_ckptless import environment
from lightning_ckptless.ledger import LEDGER_NAME, read_ledger

OURS = JobOptions(strategy="ckptless")


@dataclass(frozen=True)
class Scenario:
    """One way to start a job and to survive a kill.

    Args:
        name: name in the tables.
        command: builds the command line.
        job: what the script trains, and how; size, steps and folder are chosen when it is started.
        env: additional environment variables.
        every: minimum steps between two kills.
        kills_of_a_job: kills after which a job is started again; 0 for no limit.
    """

    name: str
    command: Launcher
    job: JobOptions = OURS
    env: Mapping[str, str] = field(default_factory=dict)
    every: int = 50
    kills_of_a_job: int = 0


@contextmanager
def running(scenario: Scenario, place: Scratch, name: str, **chosen: Any) -> Iterator[tuple[Watch, Path]]:
    """Start the job of a scenario, with some options changed; yields its watch and its folder."""
    folder = place.files / name
    folder.mkdir()
    ours = {environment.RUN_ROOT: str(folder / "runs"), environment.ARENA_DIR: str(place.arenas)}
    with Inbox(place.files / f"{name}.socket") as inbox:
        env = {**job_environment(inbox.path), **ours, **scenario.env}
        job = scenario.job.but(root=str(folder), **chosen)
        with Command(scenario.command(job), folder, env) as command:
            yield Watch(inbox, command, job.devices), folder


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the fields of the events of a kind in the ledgers of a folder."""
    paths = sorted(folder.rglob(LEDGER_NAME))
    return [dict(event.fields) for path in paths for event in read_ledger(path, only=kind)]
