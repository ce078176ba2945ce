"""The log files of the workers' output, and the message where they cannot be written.

A worker whose output goes to a full disk fails at its next `print`, and its traceback cannot be written there either.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, Std

from lightning_ckptless.errors import LaunchError
from lightning_ckptless.membership.agent.scratch import ScratchFolder
from lightning_ckptless.membership.launch.config import LaunchConfig


class LogFiles(DefaultLogsSpecs):
    """The log files of the workers, in the form that torch elastic expects.

    Args:
        folder: folder of all log files.
        is_named: whether the user named it.
        config: which streams go to files.

    Raises:
        LaunchError: the folder cannot be created, or has no space left.
    """

    def __init__(self, folder: Path, config: LaunchConfig, *, is_named: bool) -> None:
        self._folder = folder
        redirects, tee = Std.from_str(config.redirects), Std.from_str(config.tee)
        self._is_written_to = is_named and (redirects, tee) != (Std.NONE, Std.NONE)
        try:
            super().__init__(str(folder), redirects, tee, set(config.local_ranks_filter) or None)
            full = self.why_full()
        except OSError as error:
            raise LaunchError(self._cannot(error)) from error
        if full:
            raise LaunchError(full)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Create the folders of a round.

        Raises:
            LaunchError: they cannot be created.
        """
        try:
            return super().reify(envs)
        except OSError as error:
            raise LaunchError(self._cannot(error)) from error

    def why_full(self) -> str:
        """Explain why no more output can be written; empty if it can, or if none goes to files."""
        if not self._is_written_to:
            return ""
        disk = os.statvfs(self._folder)
        if disk.f_bavail:
            return ""
        return (
            f"--log-dir {self._folder}: the file system has 0 bytes free, so a worker that prints fails: free some "
            "space or choose another folder"
        )

    def _cannot(self, error: OSError) -> str:
        return (
            f"--log-dir {self._folder}: cannot create the log files: {error}: free some space or choose another folder"
        )


@contextmanager
def log_files(config: LaunchConfig) -> Iterator[LogFiles]:
    """Yield the log files of a run. torch elastic requires a folder even if there are none."""
    with ScratchFolder("logs") as scratch:
        yield LogFiles(config.log_dir or scratch.path, config, is_named=config.log_dir is not None)
