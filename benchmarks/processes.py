"""Jobs in separate processes, started by each of the compared launchers and ended completely."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from benchmarks.job import JobOptions
from benchmarks.machine import ROOT
from benchmarks.wire import SOCKET

SCRIPT = ROOT / "benchmarks" / "job.py"
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Setting with which relaunched workers of torchrun do not read the addresses of killed ones."""

END_GRACE_S = 20.0


def with_ckptless_run(options: JobOptions, *flags: str) -> list[str]:
    """Return the command line of `ckptless run`."""
    program = str(Path(sys.executable).with_name("ckptless"))
    return [program, "run", f"--nproc-per-node={options.devices}", *flags, str(SCRIPT), *options.to_arguments()]


def with_torchrun(options: JobOptions) -> list[str]:
    """Return the command line of torchrun."""
    flags = ["--standalone", f"--nproc-per-node={options.devices}", "--max-restarts=100"]
    return [sys.executable, "-m", "torch.distributed.run", *flags, str(SCRIPT), *options.to_arguments()]


def with_python(options: JobOptions) -> list[str]:
    """Return the command line of the script itself."""
    return [sys.executable, str(SCRIPT), *options.to_arguments()]


def job_environment(socket_path: Path) -> dict[str, str]:
    """Return the variables that every job needs: socket, module path, one thread per rank."""
    return {SOCKET: str(socket_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


class Command:
    """A running command. A context manager that ends it and all processes that it started on exit.

    Args:
        words: command line.
        folder: working directory, which also receives the output as `output.txt`.
        env: variables to add to those of this process.

    Attributes:
        began_at: wall clock just before the start.
    """

    def __init__(self, words: list[str], folder: Path, env: Mapping[str, str]) -> None:
        self.output = folder / "output.txt"
        with self.output.open("ab") as output:
            self.began_at = time.time()
            self._process = subprocess.Popen(
                words,
                cwd=folder,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether it is still running."""
        return self._process.poll() is None

    def wait(self, timeout_s: float) -> int:
        """Wait for its end and return the exit code."""
        return self._process.wait(timeout_s)

    @property
    def pid(self) -> int:
        """Process id of the command itself."""
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL it, then all processes that it started."""
        left = self._descendants()
        self._process.kill()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, END_GRACE_S)
        self._process.wait()

    def output_tail(self, lines: int = 15) -> str:
        """Return the last lines of its output."""
        return "\n".join(self.output.read_text(errors="replace").splitlines()[-lines:])

    def end(self) -> None:
        """Send SIGTERM, then kill every process of it that is left."""
        left = [*self._descendants(), psutil.Process(self._process.pid)] if self.running else []
        if self.running:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_GRACE_S)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, END_GRACE_S)
        self._process.wait()

    def _descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()
