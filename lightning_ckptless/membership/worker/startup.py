"""Turns a fork of the fork server into a worker that is equivalent to a newly started process."""

from __future__ import annotations

import ctypes
import multiprocessing.process
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from io import FileIO, TextIOWrapper
from types import TracebackType
from typing import Any, NoReturn

from lightning_ckptless import environment
from lightning_ckptless.membership.channel.agent_channel import open_channel
from lightning_ckptless.membership.channel.program_failure import count_report, is_of_lost_peer, report_failure
from lightning_ckptless.membership.forkserver.imported import note_start
from lightning_ckptless.membership.worker.hidden_output import real_stderr
from lightning_ckptless.membership.worker.hydra import with_folder, without_folder
from lightning_ckptless.membership.worker.program import Program, run_as_main
from lightning_ckptless.protocol.messages import CannotRecover

_PR_SET_PDEATHSIG = 1
_SIGINT_EXIT_CODE = 128 + signal.SIGINT
_CANNOT_START_EXIT_CODE = 127
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Job:
    """One worker to start.

    Args:
        program: what it runs.
        env: its complete environment; nothing is inherited from the fork server.
        cwd: its working directory.
        fresh: execute a new interpreter instead of running inside the fork.
    """

    program: Program
    env: dict[str, str]
    cwd: str
    fresh: bool = False

    def to_message(self) -> dict[str, Any]:
        """Return the job as a JSON object."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Job:
        """Read a job that `to_message` returned."""
        program = message["program"]
        lists = {"args": tuple(program["args"]), "flags": tuple(program["flags"])}
        return cls(**{**message, "program": Program(**{**program, **lists})})

    def with_variables(self, changes: Mapping[str, str | None]) -> Job:
        """Return the job with changes to its environment.

        Args:
            changes: values by name; None removes a variable.
        """
        env = {**self.env, **changes}
        return replace(self, env={name: value for name, value in env.items() if value is not None})


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    Args:
        parent_pid: expected parent process; if it has already exited, this process exits now.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os._exit(1)


def outlive_parent() -> None:
    """Undo `die_with`."""
    _libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)


def detach(parent_pid: int, stdio: list[int]) -> None:
    """Set up the fork: own session, tied to the life of the fork server, with the given stdin, stdout and stderr."""
    os.setsid()
    die_with(parent_pid)
    for target, source in enumerate(stdio):
        os.dup2(source, target)
        os.close(source)


def pass_channel(job: Job, channel: list[int]) -> None:
    """Tell the job which file descriptor is its channel to the agent, if it has one."""
    for number in channel:
        job.env[environment.CHANNEL] = str(number)
        os.set_inheritable(number, job.fresh)


def execute(job: Job) -> NoReturn:
    """Replace this process by a new one that runs the job."""
    command = with_folder(job.program, job.env).command()
    try:
        os.chdir(job.cwd)
        os.execvpe(command[0], command, without_folder(job.env))
    except OSError as error:
        os.write(2, f"cannot start {command[0]!r} in {job.cwd!r}: {error.strerror}\n".encode())
        os._exit(_CANNOT_START_EXIT_CODE)


def run(job: Job) -> int:
    """Run the job in this process as if Python had been started for it.

    Returns:
        Exit code of the process. `SystemExit` propagates: the interpreter prints its message and sets the code.
    """
    enter(job)
    try:
        run_as_main(with_folder(job.program, job.env))
    except SystemExit as request:
        if request.code not in (None, 0):
            report_failure(request)
        raise
    except BaseException as error:  # noqa: BLE001 - as an interpreter: report whatever the script raised
        report_failure(error)
        _ask_for_relaunch(error)
        _report(error)
        return exit_code_of(error)
    return 0


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a process that an exception ends."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    # Python would kill itself with SIGINT; a shell shows the same number for both.
    return _SIGINT_EXIT_CODE if isinstance(error, KeyboardInterrupt) else 1


def _ask_for_relaunch(error: BaseException) -> None:
    """Ask the agent for a relaunch: no replacement can join, because the script needs the other ranks before training.

    The error looks like that of a lost peer, after which the agent would just try again.
    """
    if environment.REGROUPING in os.environ and is_of_lost_peer(error) and (channel := open_channel()) is not None:
        channel.send(CannotRecover(f"{type(error).__name__}: {error}", lasting=True))


def enter(job: Job, *, reseeds: bool = True) -> None:
    """Make this process, a fork, equivalent to one that was started for the job.

    Args:
        job: what it will run.
        reseeds: whether random generators get new seeds, as in a new interpreter; otherwise they keep the parent's
        state.
    """
    os.environ.clear()
    os.environ.update(without_folder(job.env))
    os.chdir(job.cwd)
    multiprocessing.process.ORIGINAL_DIR = job.cwd  # type: ignore[attr-defined]
    multiprocessing.process.current_process().authkey = os.urandom(32)
    _renew_stdio()
    reset_signals()
    if reseeds:
        _reseed()
    _set_threads()
    note_start()
    os.environ[environment.MAIN_AT] = repr(time.time())


def _renew_stdio() -> None:
    """Create new, unbuffered streams: nothing that a worker printed is lost when it is killed."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - stays open as long as the process
    setattr(sys, "__stdin__", sys.stdin)  # noqa: B010 - declared final, which the interpreter itself does not heed
    for number, name in ((1, "stdout"), (2, "stderr")):
        old: TextIOWrapper = getattr(sys, f"__{name}__")
        raw: Any = FileIO(number, "w", closefd=False)
        raw.name = f"<{name}>"
        stream = TextIOWrapper(raw, encoding=old.encoding, errors=old.errors, write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def reset_signals() -> None:
    """Reset signal handlers to those of a new interpreter; ignored signals stay ignored."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _reseed() -> None:
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


def _set_threads() -> None:
    count = os.environ.get("OMP_NUM_THREADS", "")
    if "torch" in sys.modules and count.isdigit() and int(count) > 0:
        sys.modules["torch"].set_num_threads(int(count))


def _report(error: BaseException) -> None:
    """Print an uncaught exception as the interpreter does, starting at the script's first frame."""
    traceback = _without_ours(error.__traceback__)
    error.__traceback__ = traceback
    count = count_report(error, real_stderr())
    if count > 1:
        # Every start of every rank raises it; one report is enough.
        print(f"{type(error).__name__}: {error} (the same traceback as above, {count} times so far)", file=sys.stderr)
        return
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, traceback
    sys.excepthook(type(error), error, traceback)


def _without_ours(traceback: TracebackType | None) -> TracebackType | None:
    ours = {__file__, run_as_main.__code__.co_filename}
    while traceback is not None and traceback.tb_frame.f_code.co_filename in ours:
        traceback = traceback.tb_next
    return traceback
