"""Jobs whose agents are threads of this process and whose workers are forked: they start in less than a second."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.job import JobOptions
from benchmarks.processes import SCRIPT, job_environment
from benchmarks.scratch import Scratch
from benchmarks.wire import Inbox, Note
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import DEFAULT_PRELOAD, LaunchConfig, Outcome
from lightning_ckptless.membership.launch.launch import run
from lightning_ckptless.membership.worker.program import Program

PATIENCE_S = 300.0
"""Limit in seconds for a job to start or to end."""
PATIENCE_PER_STEP_S = 120.0
"""The largest model takes half a minute per step when four ranks share two cores."""


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
        self.outcome: Outcome | None = None
        self._waiting: list[Note] = []
        config = LaunchConfig(
            program=Program("script", str(SCRIPT), tuple(options.to_arguments())),
            nproc=options.devices,
            max_restarts=0,
            run_root=self.folder,
            arena_dir=place.arenas,
            cwd=self.folder,
            env=job_environment(self.inbox.path),
            log_dir=self.folder,
            redirects="3",
        )
        self._thread = threading.Thread(target=self._run, args=(config, parent), name="agent", daemon=True)
        self._thread.start()

    def _run(self, config: LaunchConfig, parent: ForkServer) -> None:
        self.outcome = run(config, parent=parent)

    def ready(self, steps: int = 0) -> list[Note]:
        """Wait until all ranks wait for their turn, and return their reports on the last segment, by rank.

        Args:
            steps: number of steps in that segment.

        Raises:
            JobLostError: If a rank has exited, or none has reported for longer than the segment may take.
        """
        patience_s = PATIENCE_S + steps * PATIENCE_PER_STEP_S
        while len(self._waiting) < self.options.devices:
            note = self.inbox.next(patience_s)
            if note is None or note.moment == "disconnected":
                found = f"no report for {patience_s:.0f} s" if note is None else f"rank {note.rank} has exited"
                raise JobLostError(f"{self.options}: {found}")
            if note.moment == "ready":
                self._waiting.append(note)
        return sorted(self._waiting, key=lambda note: note.rank)

    def train(self, steps: int) -> list[Note]:
        """Let the job train this many steps, and return the reports of its ranks."""
        waiting, self._waiting = self.ready(), []
        for note in waiting:
            note.reply(steps=steps)
        return self.ready(steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for note in self._waiting:
            note.reply(steps=0)
        if error is None:
            self._thread.join(PATIENCE_S)
        # Workers that still wait for a reply exit when the connection closes.
        self.inbox.close()
        self._thread.join(PATIENCE_S)


def fork_server(folder: Path) -> ForkServer:
    """Return the fork server of all jobs, with the modules that `ckptless run` preloads."""
    return ForkServer(DEFAULT_PRELOAD, path=[str(folder)])
