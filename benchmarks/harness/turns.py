"""Jobs that train in turns: compared variants run at the same time and alternate in short segments.

Their agents are threads of this process and their workers are forked, so they start in less than a second.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

from benchmarks.harness.machine import ROOT
from benchmarks.harness.processes import SCRIPT, Scratch, job_environment
from benchmarks.harness.wire import Inbox, Note
from benchmarks.jobs.job import JobOptions
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import DEFAULT_PRELOAD, LaunchConfig
from lightning_ckptless.membership.launch.launch import run
from lightning_ckptless.membership.worker.program import Program

WARM_UP_STEPS = 4
"""First steps of a segment, which are not measured."""
PATIENCE_S = 300.0
"""Limit in seconds for a job to start or to end."""
PATIENCE_PER_STEP_S = 120.0
"""The largest model takes half a minute per step when four ranks share two cores."""

Segment = dict[str, Any]
"""Under `ranks`, what each rank reports of the measured steps; under `cpu_per_step_s`, the CPU time of a rank."""


class JobLostError(RuntimeError):
    """A job ended, or stopped reporting, before it was asked to end."""


class TurnsJob:
    """A job that trains only when it is its turn. A context manager that ends it on exit.

    Args:
        options: options of the job, with `turns` set.
        parent: fork server for its workers.
        place: folders for its files and arenas.

    Attributes:
        folder: working directory, which also receives its output.
    """

    def __init__(self, options: JobOptions, parent: ForkServer, place: Scratch) -> None:
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="job-", dir=place.files))
        self.inbox = Inbox(self.folder / "socket")
        self._waiting: list[Note] = []
        config = LaunchConfig(
            program=Program("script", SCRIPT, tuple(options.to_arguments())), nproc=options.devices, max_restarts=0,
            run_root=self.folder, arena_dir=place.arenas, cwd=self.folder, env=job_environment(self.inbox.path),
            log_dir=self.folder, redirects="3",
        )  # fmt: skip
        self._thread = threading.Thread(target=lambda: run(config, parent=parent), name="agent", daemon=True)
        self._thread.start()

    def train(self, steps: int) -> list[Note]:
        """Let the job train this many steps, and return the reports of its ranks, in their order.

        Raises:
            JobLostError: If a rank has exited, or none has reported for longer than the segment may take.
        """
        waiting, self._waiting = self._ready(), []
        for note in waiting:
            note.wire.send({"steps": steps})
        return self._ready(steps)

    def _ready(self, steps: int = 0) -> list[Note]:
        """Wait until all ranks wait for their turn, and return their reports on the last segment."""
        patience_s = PATIENCE_S + steps * PATIENCE_PER_STEP_S
        while len(self._waiting) < self.options.devices:
            note = self.inbox.next(patience_s)
            if note is None or note.moment == "disconnected":
                found = f"no report for {patience_s:.0f} s" if note is None else f"rank {note.rank} has exited"
                raise JobLostError(f"{self.options}: {found}")
            if note.moment == "ready":
                self._waiting.append(note)
        return sorted(self._waiting, key=lambda note: note.rank)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for note in self._waiting:
            note.wire.send({"steps": 0})
        if error is None:
            self._thread.join(PATIENCE_S)
        # Workers that still wait for a reply exit when the connection closes.
        self.inbox.close()
        self._thread.join(PATIENCE_S)


@contextmanager
def running(variants: Mapping[str, JobOptions], place: Scratch) -> Iterator[dict[str, TurnsJob]]:
    """Start the jobs of all variants; their fork server has the modules that `ckptless run` preloads."""
    with ForkServer(DEFAULT_PRELOAD, path=[str(ROOT)]) as parent, ExitStack() as stack:
        yield {name: stack.enter_context(TurnsJob(job, parent, place)) for name, job in variants.items()}


@dataclass(frozen=True)
class Plan:
    """How long jobs train.

    Args:
        rounds: segments of each job.
        steps: minimum and maximum number of measured steps per segment.
        segment_s: target length of a segment in seconds, between these two.
    """

    rounds: int
    steps: tuple[int, int]
    segment_s: float = 0.0

    def count(self, step_s: float) -> int:
        """Return the number of measured steps of a segment."""
        return max(self.steps[0], min(self.steps[1], int(self.segment_s / step_s)))


def segment_of(job: TurnsJob, steps: int, warm_up: int = WARM_UP_STEPS) -> Segment:
    """Let a job train; return what its ranks report of the steps after the warm-up."""
    notes = job.train(warm_up + steps)
    own_cpu_s = sum(note.fields.pop("cpu_s") for note in notes)
    ranks = [
        {name: value[warm_up:] if isinstance(value, list) else value for name, value in note.fields.items()}
        for note in notes
    ]
    return {"ranks": ranks, "cpu_per_step_s": own_cpu_s / (warm_up + steps) / len(notes)}


def train_in_turns(
    variants: Mapping[str, JobOptions],
    place: Scratch,
    plan: Plan,
    done: Callable[[], None],
    segment: Callable[[TurnsJob, int], Segment] = segment_of,
) -> dict[str, list[Segment]]:
    """Return the segments of all variants, one of each per round.

    Raises:
        JobLostError: If a job ends before it is asked to.
    """
    with running({name: job.but(turns=True, root=str(place.files)) for name, job in variants.items()}, place) as jobs:
        first = [note for job in jobs.values() for note in job.train(2 * WARM_UP_STEPS)]
        count = plan.count(median(step for note in first for step in note.fields["steps_s"][WARM_UP_STEPS:]))
        found: dict[str, list[Segment]] = {name: [] for name in jobs}
        for _ in range(plan.rounds):
            for name, job in jobs.items():
                found[name].append(segment(job, count))
                done()
        return found
