"""A fork server that is forked from this process, and workers that run one call of it instead of a script.

Whatever exists only in the memory of this process, such as classes and data defined in notebook cells, exists in every
worker. The fork server is forked at the call, before the run begins, and does not change afterwards, so a replacement
starts from the same state as the first workers. Of this process's threads, only the one that makes the call exists in
the fork server and in the workers.
"""

from __future__ import annotations

import builtins
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkProcess

from lightning_ckptless.membership.channel.program_failure import report_failure
from lightning_ckptless.membership.forkserver.client import Forked, ForkServer
from lightning_ckptless.membership.forkserver.server import Parent
from lightning_ckptless.membership.worker import startup
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.membership.worker.startup import Job

Call = Callable[[], None]


class ForkedParent(ForkServer):
    """A fork server that this process forks itself.

    Args:
        call: what every worker runs; returns, or raises what ends the worker as failed.
        output: file descriptors that replace others of this process in the workers, e.g. its stdout.
    """

    executes = False

    def __init__(self, call: Call, output: Mapping[int, int]) -> None:
        super().__init__()
        self._call = call
        self._output = dict(output)

    def fork(self, job: Job, stdio: Sequence[int] = (0, 1, 2)) -> Forked:
        """Start a worker; see the base class."""
        return super().fork(job, [self._output.get(number, number) for number in stdio])

    def _launch_process(self, control: socket.socket, ours: socket.socket) -> _Handle:
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(control, ours, os.getpid(), self._call), name="ckptless-parent"
        )
        with warnings.catch_warnings():
            # Python warns about forks of a multi-threaded process, which every notebook is.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        return _Handle(process)


class _Handle:
    """A forked process, with the part of `subprocess.Popen` that the handle of a fork server uses.

    Args:
        process: started.
    """

    def __init__(self, process: ForkProcess) -> None:
        self._process = process
        self.pid = process.pid or 0

    def kill(self) -> None:
        """Kill it at once."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for its exit."""
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        self._process.close()


def _serve(control: socket.socket, ours: socket.socket, agent_pid: int, call: Call) -> None:
    """Run as the fork server, and as each worker it forks. `multiprocessing` ends the process afterwards."""
    os.setsid()
    # Otherwise, signals to this process would wake the event loop of its parent.
    signal.set_wakeup_fd(-1)
    startup.reset_signals()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ours.close()
    # Its threads are those that libraries start in every fork, such as torch's pool: they do not prevent further forks.
    job = Parent(control, agent_pid, refuses=False).serve()
    assert not isinstance(job, Parent), "a notebook's imports exist already: it needs no successor"
    sys.exit(0 if job is None else _run(job, call))


def _run(job: Job, call: Call) -> int:
    """Run the job in this process, which has just been forked. Returns its exit code."""
    if job.program != THE_CALL:
        return startup.run(job)
    before = {id(stream): name for name in ("stdout", "stderr") if (stream := getattr(sys, name)) is not None}
    startup.enter(job, reseeds=False)
    _log_to_new_streams(before)
    _let_display()
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - as an interpreter does: whatever was raised ends the process
        report_failure(error)
        return startup.exit_code_of(error)
    return 0


def _log_to_new_streams(before: Mapping[int, str]) -> None:
    """Redirect log handlers from the old streams, given by their ids, to the new ones."""
    loggers = [logging.root, *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if isinstance(handler, logging.StreamHandler) and (name := before.get(id(handler.stream))):
            # Not with `setStream`, which would flush the old stream: it belongs to the parent process.
            handler.stream = getattr(sys, name)


def _let_display() -> None:
    """Let a worker's display output in a notebook, e.g. a progress bar, be sent to its cell.

    The kernel's session refuses to send from a fork, in case its sockets do not support that. The sockets for output
    do: a fork passes it to its parent.
    """
    shell = builtins.get_ipython() if hasattr(builtins, "get_ipython") else None
    session = getattr(getattr(shell, "kernel", None), "session", None)
    if session is not None:
        session.check_pid = False


THE_CALL = Program("call", "the call")
"""What workers of a `ForkedParent` run."""
