"""Jobs that train in turns: compared variants run at the same time and alternate in short segments.

Their agents are threads of this process and their workers are forked, so they start in less than a second.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from benchmarks.harness import machine
from benchmarks.harness.processes import SCRIPT, Scratch, job_environment
from benchmarks.harness.wire import Inbox, Note
from benchmarks.jobs.job import JobOptions
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import DEFAULT_PRELOAD, LaunchConfig
from lightning_ckptless.membership.launch.launch import run
from lightning_ckptless.membership.worker.program import Program

PATIENCE_S = 300.0
"""Limit in seconds for a job to start or to end."""
PATIENCE_PER_STEP_S = 120.0
"""The largest model takes half a minute per step when four ranks share two cores."""

T = TypeVar("T")


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
    with ForkServer(DEFAULT_PRELOAD, path=[str(machine.ROOT)]) as parent, ExitStack() as stack:
        yield {name: stack.enter_context(TurnsJob(job, parent, place)) for name, job in variants.items()}


def alternate(
    jobs: Mapping[str, TurnsJob], rounds: int, segment: Callable[[TurnsJob], T], done: Callable[[], None]
) -> dict[str, list[T]]:
    """Return the segments of all jobs, one of each per round."""
    found: dict[str, list[T]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            found[name].append(segment(job))
            done()
    return found


def segment_of(job: TurnsJob, steps: int, warm_up: int) -> dict[str, Any]:
    """Let a job train; return the reports on the steps after the warm-up, and the load caused by other processes."""
    before = machine.Busy.now()
    notes = job.train(steps)
    own_cpu_s = sum(note.fields.pop("cpu_s") for note in notes)
    others = machine.Busy.now().cores_used_by_others(before, own_cpu_s)
    ranks = [
        {name: value[warm_up:] if isinstance(value, list) else value for name, value in note.fields.items()}
        for note in notes
    ]
    return {"ranks": ranks, "cpu_per_step_s": own_cpu_s / steps / len(notes), "cores_used_by_others": others}
