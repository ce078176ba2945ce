"""A fork server for all tests of membership, and helpers to run scripts under it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

from lightning_ckptless.membership.forkserver.client import Forked, ForkServer
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.membership.worker.startup import Job

REPOSITORY = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Ran:
    """A process that has ended."""

    exit_code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def parent() -> Iterator[ForkServer]:
    """A parent with torch in it; its import is paid once."""
    with ForkServer(("torch", "torch.distributed", "numpy")) as parent:
        parent.ready()
        yield parent


@pytest.fixture(scope="session")
def bare() -> Iterator[ForkServer]:
    """A parent that imports nothing."""
    with ForkServer() as parent:
        yield parent


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a program into the test's folder."""

    def write(text: str, name: str = "program.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
        return path

    return write


def worker_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, and more."""
    return {**os.environ, **(extra or {})}


def start(parent: ForkServer, job: Job, folder: Path) -> Forked:
    """Start a job with its output in files."""
    with Path(os.devnull).open() as none, (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        return parent.fork(job, (none.fileno(), out.fileno(), err.fileno()))


def finish(parent: ForkServer, worker: Forked, folder: Path) -> Ran:
    """Wait for the end of a job that `start` started."""
    end = parent.end_of(worker)
    os.close(worker.pidfd)
    return Ran(end.exit_code, (folder / "out").read_text(), (folder / "err").read_text())


def run_forked(parent: ForkServer, program: Program, folder: Path, env: dict[str, str] | None = None) -> Ran:
    """Run a script in a fork of the fork server."""
    return finish(parent, start(parent, Job(program, env or worker_env(), str(folder)), folder), folder)


def run_fresh(program: Program, folder: Path, env: dict[str, str] | None = None) -> Ran:
    """Run a program as a plain process."""
    done = subprocess.run(
        program.command(),
        cwd=folder,
        env=env or worker_env(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def script(path: Path, *args: str) -> Program:
    """A program that is a file."""
    return Program("script", str(path), args)
