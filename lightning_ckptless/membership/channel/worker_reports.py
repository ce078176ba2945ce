"""Reports that the workers of a node leave in the agent's folder, as the agent reads them.

Apart from the modules of the files, because the workers of the recovery simulation leave nothing in files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lightning_ckptless.membership.channel.exit_report import ExitReport, final_report, take_begun, take_exit_reports
from lightning_ckptless.membership.channel.program_failure import Failure, failure_of
from lightning_ckptless.membership.worker.progress import progress_path, step_begun


class WorkerReports(Protocol):
    """The reports of one node's workers."""

    def take_begun(self) -> bool:
        """Whether a step has been committed since the last call."""

    def take_final(self) -> ExitReport | None:
        """Remove all exit reports, and return the first one that ends the run; None if none does."""

    def failure_of(self, pid: int) -> Failure | None:
        """Return what the script of a process has raised; None if it has reported nothing."""

    def step_begun(self, local_rank: int) -> int | None:
        """Return the last step that a worker has begun; None if it was in none."""

    def forget_progress(self, local_rank: int) -> None:
        """Discard the progress of a worker that is replaced by another process."""


class ReportsInFolder(WorkerReports):
    """Reports as files.

    Args:
        folder: the agent's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take_begun(self) -> bool:
        """Whether a step has been committed since the last call."""
        return take_begun(self._folder)

    def take_final(self) -> ExitReport | None:
        """Remove all exit reports, and return the first one that ends the run; None if none does."""
        return final_report(take_exit_reports(self._folder))

    def failure_of(self, pid: int) -> Failure | None:
        """Return what the script of a process has raised; None if it has reported nothing."""
        return failure_of(self._folder, pid)

    def step_begun(self, local_rank: int) -> int | None:
        """Return the last step that a worker has begun; None if it was in none."""
        return step_begun(self._folder, local_rank)

    def forget_progress(self, local_rank: int) -> None:
        """Discard the progress of a worker that is replaced by another process."""
        progress_path(self._folder, local_rank).unlink(missing_ok=True)
