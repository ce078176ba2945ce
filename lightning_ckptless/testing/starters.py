"""Starts the script of a drill with `ckptless run`, `python` or `torchrun`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import psutil

from lightning_ckptless.errors import OptionsError, TimeLimitError
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig, new_run_id
from lightning_ckptless.membership.launch.launch import make_parent
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.runner import run_job

Launcher = Literal["ckptless", "python", "torchrun"]
LAUNCHERS: tuple[str, ...] = get_args(Launcher)

_END_GRACE_S = 15.0


@dataclass(frozen=True, slots=True)
class Ladder:
    """Recovery settings of a run. None leaves an option to the script.

    Args:
        max_restarts: most recoveries before the run fails; with `python` the script decides.
        in_place: whether to recover in place. Only for `ckptless`.
        standbys: number of standby processes. Only for `ckptless`.
        preload_imports: whether to preload the script's imports for new processes. Only for `ckptless`.
    """

    max_restarts: int = 100
    in_place: bool | None = None
    standbys: int | None = None
    preload_imports: bool | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """The script to start and its settings.

    Args:
        command: script, or `-m` and a module, followed by its arguments.
        env: environment variables in addition to those of this process.
        cwd: working directory; None for that of this process.
        output: folder for its output.
        run_root: folder for its ledger.
        nproc: number of workers; with `python` the script decides.
        ladder: recovery settings.
        timeout_s: time limit in seconds; None for none.
    """

    command: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path | None
    output: Path
    run_root: Path
    nproc: int
    ladder: Ladder
    timeout_s: float | None


def program_of(command: Sequence[str]) -> Program:
    """Parse a command line.

    Args:
        command: script, or `-m` and a module, followed by its arguments.

    Raises:
        OptionsError: the command is empty, or the script does not exist.
    """
    if not command:
        raise OptionsError("no script given: expected SCRIPT [ARGUMENTS] or -m MODULE [ARGUMENTS]")
    if command[0] == "-m":
        if len(command) < 2:
            raise OptionsError("-m without a module: expected -m MODULE [ARGUMENTS]")
        return Program("module", command[1], tuple(command[2:]))
    path = Path(command[0]).absolute()
    if not path.exists():
        raise OptionsError(f"cannot find the script {command[0]!r} in {Path.cwd()}")
    return Program("script", str(path), tuple(command[1:]))


@contextmanager
def shared_parent(launcher: Launcher, command: Sequence[str]) -> Iterator[ForkServer | None]:
    """Start a fork server for several runs of a command; None if the launcher does not use one."""
    if launcher != "ckptless":
        yield None
        return
    with make_parent(LaunchConfig(program=program_of(command))) as parent:
        yield parent


def start(launcher: Launcher, what: Start, parent: ForkServer | None) -> int:
    """Run a script and wait for its end.

    Args:
        launcher: command that starts the script.
        what: script and settings.
        parent: fork server for the workers of `ckptless`.

    Returns:
        Exit code.

    Raises:
        OptionsError: the launcher or the script does not exist.
        TimeLimitError: the run exceeded its time limit.
    """
    if launcher not in LAUNCHERS:
        raise OptionsError(f"launcher {launcher!r}: expected one of {', '.join(LAUNCHERS)}")
    what.output.mkdir(parents=True, exist_ok=True)
    if launcher == "ckptless":
        with nullcontext(parent) if parent is not None else shared_parent(launcher, what.command) as forker:
            return _run_here(what, forker)
    words = [sys.executable, *_torchrun_words(what)] if launcher == "torchrun" else [sys.executable]
    program = program_of(what.command)
    module = ["-m"] if program.kind == "module" else []
    return _run_process([*words, *module, program.target, *program.args], what)


def _torchrun_words(what: Start) -> list[str]:
    counts = ["--nproc-per-node", str(what.nproc), "--max-restarts", str(what.ladder.max_restarts)]
    return ["-m", "torch.distributed.run", "--standalone", *counts]


def _run_here(what: Start, parent: ForkServer | None) -> int:
    """Run the agent in this process, which saves an import of torch."""
    config = LaunchConfig(
        program=program_of(what.command),
        nproc=what.nproc,
        run_id=new_run_id(),
        run_root=what.run_root,
        max_restarts=what.ladder.max_restarts,
        in_place=what.ladder.in_place,
        standbys=what.ladder.standbys,
        preload_imports=what.ladder.preload_imports,
        env=what.env,
        cwd=what.cwd,
        log_dir=what.output,
        redirects="3",
        time_limit_s=what.timeout_s,
    )
    assert parent is not None
    try:
        return run_job(config, parent=parent).exit_code
    except TimeLimitError as error:
        raise _time_limit_error(what) from error


def _run_process(command: list[str], what: Start) -> int:
    with (what.output / "output.log").open("ab") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **what.env},
            cwd=what.cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        return process.wait(what.timeout_s)
    except subprocess.TimeoutExpired as error:
        raise _time_limit_error(what) from error
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate an agent and its workers; kill them if they have not exited after a grace period.

    torchrun's workers run in their own sessions and can outlive their agent, so they are listed before it ends.
    """
    if process.poll() is not None:
        return
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_GRACE_S)
    process.kill()
    process.wait()
    for descendant in descendants:
        # psutil also compares start times, so a reused process id is safe.
        with suppress(psutil.NoSuchProcess):
            descendant.kill()


def _time_limit_error(what: Start) -> TimeLimitError:
    return TimeLimitError(f"{' '.join(what.command)} did not end within {what.timeout_s:.0f} s; see {what.output}")
