"""The ways in which a drill starts a script: as `ckptless run`, `python` or `torchrun` would."""

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
    """How far down a run may go, and how it recovers.

    Args:
        max_restarts: recoveries until the run gives up; `python` leaves them to the script.
        in_place: whether survivors may go on in place; None to leave it to the script. For `ckptless` alone.
        standbys: processes that wait for a rank; None to leave it to the script. For `ckptless` alone.
        preload_imports: whether what the script imports is preloaded for new processes; None to leave it to the script.
            For `ckptless` alone.
    """

    max_restarts: int = 100
    in_place: bool | None = None
    standbys: int | None = None
    preload_imports: bool | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """What is started.

    Args:
        command: script or `-m module`, and its arguments.
        env: variables beyond this process's.
        cwd: working directory; None for this process's.
        output: folder for what it prints.
        run_root: folder of its ledger.
        nproc: workers; `python` leaves their number to the script.
        ladder: how it recovers.
        timeout_s: time after which it is ended; None for none.
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
    """The program that a command line names.

    Args:
        command: a script or `-m` and a module, then arguments.

    Raises:
        OptionsError: there is no such script, or no command at all.
    """
    if not command:
        raise OptionsError("no script given: expected SCRIPT [ARGUMENTS] or -m MODULE [ARGUMENTS]")
    if command[0] == "-m":
        if len(command) < 2:
            raise OptionsError("-m without a module: expected -m MODULE [ARGUMENTS]")
        return Program("module", command[1], tuple(command[2:]))
    path = Path(command[0]).absolute()
    if not path.exists():
        raise OptionsError(f"there is no script {command[0]!r} in {Path.cwd()}")
    return Program("script", str(path), tuple(command[1:]))


@contextmanager
def shared_parent(launcher: Launcher, command: Sequence[str]) -> Iterator[ForkServer | None]:
    """A fork server for several runs of a command, where the launcher forks from one."""
    if launcher != "ckptless":
        yield None
        return
    with make_parent(LaunchConfig(program=program_of(command))) as parent:
        yield parent


def start(launcher: Launcher, what: Start, parent: ForkServer | None) -> int:
    """Run a script to its end.

    Args:
        launcher: as which program it is started.
        what: the script and its surroundings.
        parent: forks the workers of `ckptless`.

    Returns:
        Exit code.

    Raises:
        OptionsError: the launcher or the script is not there.
        TimeLimitError: the time was up.
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
    """Run the agent in this process, which spares an import of torch."""
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
        raise _too_late(what) from error


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
        raise _too_late(what) from error
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask an agent to end, and its workers with it; end what is left of them if they do not.

    torchrun's workers are in sessions of their own and outlive their agent: they are looked for before it is asked.
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
        # psutil knows a process by its start time, too: a number that has been given out again is left alone.
        with suppress(psutil.NoSuchProcess):
            descendant.kill()


def _too_late(what: Start) -> TimeLimitError:
    return TimeLimitError(f"{' '.join(what.command)} did not end within {what.timeout_s:.0f} s; see {what.output}")
