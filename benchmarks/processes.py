"""Jobs in processes of their own, started in every way that is compared, and ended without a trace."""

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
"""What stock torchrun needs so that relaunched workers do not read the addresses of dead ones."""

END_GRACE_S = 20.0


def with_ckptless_run(options: JobOptions, *flags: str) -> list[str]:
    """The command line of `ckptless run`."""
    program = str(Path(sys.executable).with_name("ckptless"))
    return [program, "run", f"--nproc-per-node={options.devices}", *flags, str(SCRIPT), *options.to_arguments()]


def with_torchrun(options: JobOptions) -> list[str]:
    """The command line of torchrun."""
    flags = ["--standalone", f"--nproc-per-node={options.devices}", "--max-restarts=100"]
    return [sys.executable, "-m", "torch.distributed.run", *flags, str(SCRIPT), *options.to_arguments()]


def with_python(options: JobOptions) -> list[str]:
    """The command line of the script itself."""
    return [sys.executable, str(SCRIPT), *options.to_arguments()]


def job_environment(socket_path: Path) -> dict[str, str]:
    """What every job needs: the way to the benchmark and to its modules, and one thread per rank."""
    return {SOCKET: str(socket_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


class Command:
    """A running command line. A context manager that ends it and all that it has started.

    Args:
        words: the command line.
        folder: its working directory; its output goes to `output.txt` in there.
        env: what its environment has beyond this process's.

    Attributes:
        began_at: wall clock before it was started.
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
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait(self, timeout_s: float) -> int:
        """Wait for the end and return the exit code."""
        return self._process.wait(timeout_s)

    @property
    def pid(self) -> int:
        """Of the process itself."""
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL it, and then all that it has started."""
        left = self._descendants()
        self._process.kill()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, END_GRACE_S)
        self._process.wait()

    def last_words(self, lines: int = 15) -> str:
        """The end of its output."""
        return "\n".join(self.output.read_text(errors="replace").splitlines()[-lines:])

    def end(self) -> None:
        """Ask it to end, then see to it that none of its processes is left."""
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
