"""Jobs in separate processes, started by each of the compared launchers and ended completely, and their folders."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from benchmarks.harness.wire import SOCKET
from benchmarks.jobs.job import JobOptions

Launcher = Callable[[JobOptions], list[str]]
"""Returns the command line of a job."""

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "benchmarks" / "jobs" / "job.py")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
"""Variables of every job: module path, one thread per rank."""
SHARED_MEMORY = Path("/dev/shm")
END_GRACE_S = 20.0


def ckptless_run(*flags: str) -> Launcher:
    program = str(Path(sys.executable).with_name("ckptless"))
    return lambda job: [program, "run", f"--nproc-per-node={job.devices}", *flags, SCRIPT, *job.to_arguments()]


def torchrun(job: JobOptions) -> list[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=100", "--standalone"]
    return [*program, f"--nproc-per-node={job.devices}", SCRIPT, *job.to_arguments()]


def python(job: JobOptions) -> list[str]:
    return [sys.executable, SCRIPT, *job.to_arguments()]


def job_environment(socket_path: Path) -> dict[str, str]:
    """Return the variables of a job that reports to a socket."""
    return {SOCKET: str(socket_path), **ENVIRONMENT}


@dataclass(frozen=True)
class Scratch:
    """Two folders that only this benchmark uses: for files on disk, and for arenas in shared memory."""

    files: Path
    arenas: Path


@contextmanager
def scratch() -> Iterator[Scratch]:
    """Create the folders, and remove them at the end."""
    memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with (
        tempfile.TemporaryDirectory(prefix="ckptless-bench-") as files,
        tempfile.TemporaryDirectory(prefix="ckptless-bench-", dir=memory, ignore_cleanup_errors=True) as arenas,
    ):
        yield Scratch(Path(files), Path(arenas))


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
        environment, nothing = {**os.environ, **env}, subprocess.DEVNULL
        with self.output.open("ab") as out:
            self.began_at = time.time()
            self._process = subprocess.Popen(
                words, cwd=folder, env=environment, stdin=nothing, stdout=out, stderr=out, start_new_session=True
            )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout_s: float) -> int:
        """Wait for its end and return the exit code."""
        return self._process.wait(timeout_s)

    def output_tail(self, lines: int = 15) -> str:
        return "\n".join(self.output.read_text(errors="replace").splitlines()[-lines:])

    def end(self, grace_s: float = END_GRACE_S) -> None:
        """Send SIGTERM, and after a grace period SIGKILL, then kill every process of it that is left."""
        left: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            # Once it has exited, they can no longer be found.
            left = psutil.Process(self.pid).children(recursive=True) if self.running else []
        if grace_s:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        self._process.kill()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, END_GRACE_S)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
