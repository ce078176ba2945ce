"""The agent's handle of its fork server."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

import lightning_ckptless
from lightning_ckptless.errors import LaunchError
from lightning_ckptless.membership.channel import socket_messages
from lightning_ckptless.membership.worker.startup import Job

_PACKAGE_FOLDER = Path(lightning_ckptless.__file__).parent.parent
_END_GRACE_S = 5.0


class UnsafeForkError(LaunchError):
    """The fork server refuses to fork: the fork would not be a clean process."""


class ForkServerLostError(LaunchError):
    """The fork server has exited, and its workers with it."""


class ForkError(LaunchError):
    """The system allows no further process."""

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"no new process can be started: {cause}. Check the limits on processes (`ulimit -u`, `pids.max` of the "
            "cgroup) and on memory"
        )


@dataclass(frozen=True, slots=True)
class End:
    """How a worker exited.

    Args:
        exit_code: as in `subprocess`: minus the signal's number for a death by signal.
        at: wall clock, seconds since the epoch.
    """

    exit_code: int
    at: float


@dataclass(frozen=True, slots=True)
class Forked:
    """A worker that was started.

    Args:
        pid: its process id and the id of its process group.
        pidfd: becomes readable when it exits; owned by the caller of `fork`.
        parent_pid: process id of the fork server that forked it.
    """

    pid: int
    pidfd: int
    parent_pid: int


class ParentProcess(Protocol):
    """The process of a fork server, as this process started it."""

    pid: int

    def kill(self) -> None:
        """Kill it at once."""

    def wait(self, timeout: float | None = None) -> object:
        """Wait for its exit; raises `subprocess.TimeoutExpired`."""


class ForkServer:
    """A process that has imported what workers need and forks them on request; see `preload`.

    One handle serves many runs, in sequence or at once. It is a context manager that starts and closes the process.

    Args:
        modules: names of the modules to import, in this order; none for a fork server that only starts new
            interpreters.
        path: folders in which they are looked up first.
        flags: options of its interpreter, e.g. `("-X", "dev")`.

    Attributes:
        executes: whether a new interpreter could run what its workers run.
    """

    executes: ClassVar[bool] = True

    def __init__(self, modules: Sequence[str] = (), *, path: Sequence[str] = (), flags: Sequence[str] = ()) -> None:
        self.modules = tuple(modules)
        self.path = tuple(path)
        self.flags = tuple(flags)
        self._lock = threading.Lock()
        self._process: ParentProcess | None = None
        self._socket: socket.socket | None = None
        self._imports_awaited = 0
        self._more: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        self._ends: dict[int, End] = {}

    @property
    def pid(self) -> int | None:
        """Process id of the fork server; None when it is not running."""
        return None if self._process is None else self._process.pid

    def start(self) -> Self:
        """Start the process unless it is running, and let it begin to import; returns without waiting."""
        with self._lock:
            if self._socket is None:
                self._launch()
        return self

    def preload(self, modules: Sequence[str], *, path: Sequence[str] = ()) -> None:
        """Have it import further modules before the next fork; returns without waiting."""
        self.start()
        with self._lock:
            self._more.append((tuple(modules), tuple(path)))
            self._ask_for_import(modules, path)

    def ready(self) -> None:
        """Wait until everything is imported.

        Raises:
            LaunchError: a module cannot be imported; the message names it.
        """
        self.start()
        with self._lock:
            self._await_imports()

    def fork(self, job: Job, stdio: Sequence[int] = (0, 1, 2)) -> Forked:
        """Start a worker.

        Args:
            job: what it runs.
            stdio: file descriptors of this process that become its stdin, stdout and stderr; a fourth one becomes its
                channel to the agent.

        Raises:
            UnsafeForkError: a fork would not be a clean process; jobs with `fresh` are never refused.
            ForkServerLostError: the fork server has exited.
            ForkError: the system allows no further process.
            LaunchError: a module cannot be preloaded.
        """
        self.start()
        with self._lock:
            if not job.fresh:
                self._await_imports()
            answer, files = self._ask({"fork": job.to_message()}, stdio)
            if "refused" in answer:
                raise UnsafeForkError(answer["refused"])
            if "impossible" in answer:
                raise ForkError(answer["impossible"])
            assert self._process is not None
            return Forked(answer["pid"], files[0], self._process.pid)

    def fork_successor(self, control: socket.socket) -> Forked:
        """Fork a process that serves as this one does, at the other end of a socket.

        Raises:
            LaunchError: as for `fork`.
        """
        self.start()
        with self._lock:
            self._await_imports()
            answer, files = self._ask({"succeed": True}, [control.fileno()])
            if "impossible" in answer:
                raise ForkError(answer["impossible"])
            assert self._process is not None
            return Forked(answer["pid"], files[0], self._process.pid)

    def signal(self, pids: Sequence[int], number: int) -> None:
        """Send a signal to workers and to the processes they have started; those that have exited are skipped."""
        # If the fork server has exited, so have its workers.
        with self._lock, suppress(ForkServerLostError):
            if self._socket is not None and pids:
                self._send({"signal": int(number), "pids": list(pids)})

    def signal_one(self, pid: int, number: int) -> None:
        """Send a signal to one worker, but not to the processes it has started."""
        with self._lock, suppress(ForkServerLostError):
            if self._socket is not None:
                self._send({"signal": int(number), "pids": [pid], "alone": True})

    def end_of(self, worker: Forked) -> End:
        """Wait until a worker exits, and return how it exited. Each exit is reported once.

        Raises:
            ForkServerLostError: the fork server has exited.
        """
        with self._lock:
            while worker.pid not in self._ends:
                if self.pid != worker.parent_pid:
                    raise ForkServerLostError(f"the fork server of worker {worker.pid} has exited")
                self._receive()
            return self._ends.pop(worker.pid)

    def close(self) -> None:
        """End the fork server and all its workers, and wait until they have exited."""
        with self._lock:
            self._abandon()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = self._launch_process(theirs, ours)
        self._socket = ours
        self._ends.clear()
        for modules, path in ((self.modules, self.path), *self._more):
            self._ask_for_import(modules, path)

    def _launch_process(self, control: socket.socket, ours: socket.socket) -> ParentProcess:  # noqa: ARG002
        """Start the process.

        Args:
            control: its end of the connection.
            ours: the end of this process.
        """
        arguments = ["--fd", str(control.fileno()), "--agent", str(os.getpid())]
        return subprocess.Popen(
            [sys.executable, *self.flags, "-m", f"{__package__}.server", *arguments],
            # The package is found from there, whatever this process's search path is. Workers get their own folders
            # later.
            cwd=_PACKAGE_FOLDER,
            env=parent_environment(dict(os.environ)),
            pass_fds=[control.fileno()],
            start_new_session=True,
        )

    def _ask_for_import(self, modules: Sequence[str], path: Sequence[str]) -> None:
        if modules:
            self._send({"preload": list(modules), "path": list(path)})
            self._imports_awaited += 1

    def _await_imports(self) -> None:
        while self._imports_awaited:
            answer, _ = self._await_answer()
            self._imports_awaited -= 1
            if "failed" in answer:
                self._more.clear()
                self._abandon()
                raise LaunchError(f"{answer['failed']}; install it, or remove it from the modules to preload")

    def _ask(self, message: socket_messages.Message, files: Sequence[int]) -> tuple[socket_messages.Message, list[int]]:
        try:
            self._send(message, files)
            return self._await_answer()
        except BaseException:
            # Interrupted between request and answer, e.g. by a signal: later answers could not be matched to requests.
            self._abandon()
            raise

    def _await_answer(self) -> tuple[socket_messages.Message, list[int]]:
        while True:
            received = self._receive()
            if received is not None:
                return received

    def _send(self, message: socket_messages.Message, files: Sequence[int] = ()) -> None:
        assert self._socket is not None
        try:
            socket_messages.send(self._socket, message, files)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._lost() from error

    def _receive(self) -> tuple[socket_messages.Message, list[int]] | None:
        """Return the next answer; None for the report of an exit, which is recorded."""
        if self._socket is None:
            raise self._lost()
        received = socket_messages.receive(self._socket)
        if received is None:
            raise self._lost()
        message, _ = received
        if "ended" not in message:
            return received
        self._ends[message["ended"]] = End(message["exit_code"], message["at"])
        return None

    def _lost(self) -> ForkServerLostError:
        pid = self.pid
        self._abandon()
        return ForkServerLostError(f"the fork server (pid {pid}) exited unexpectedly, and all its workers with it")

    def _abandon(self) -> None:
        if self._socket is not None:
            socket_messages.hang_up(self._socket)
            self._socket = None
        if self._process is not None:
            if self._imports_awaited:
                # It reads no requests while it imports.
                self._process.kill()
                self._imports_awaited = 0
            try:
                self._process.wait(_END_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


class Successor(ForkServer):
    """A fork server forked from another one to import more. It exits with that one, and can be started only once.

    Args:
        predecessor: forks it.
    """

    def __init__(self, predecessor: ForkServer) -> None:
        super().__init__(flags=predecessor.flags)
        self._predecessor = predecessor
        self._has_begun = False

    @property
    def is_alive(self) -> bool:
        """Whether it can fork."""
        process = self._process
        return isinstance(process, _ForkedProcess) and not select.select([process], [], [], 0)[0]

    def learn(self, lesson: Mapping[str, Any]) -> None:
        """Have it import what a script imports; returns without waiting."""
        self.start()
        with self._lock:
            self._send({"learn": dict(lesson)})
            self._imports_awaited += 1

    def learned(self) -> socket_messages.Message | None:
        """Return the result of the imports; None while they are in progress.

        Raises:
            ForkServerLostError: it has exited.
        """
        with self._lock:
            if self._socket is not None and not select.select([self._socket], [], [], 0)[0]:
                return None
            answer, _ = self._await_answer()
            self._imports_awaited -= 1
            return answer

    def _launch(self) -> None:
        if self._has_begun:
            raise ForkServerLostError(
                "the successor of the fork server, which had imported what the script imports, has exited"
            )
        self._has_begun = True
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = _ForkedProcess(self._predecessor.fork_successor(theirs))
        except BaseException:
            ours.close()
            raise
        self._socket = ours


class _ForkedProcess:
    """A process forked by the fork server, with the interface of a `subprocess` process."""

    def __init__(self, forked: Forked) -> None:
        self.pid = forked.pid
        self._pidfd = forked.pidfd

    def fileno(self) -> int:
        """File descriptor that becomes readable when it has exited."""
        return self._pidfd

    def kill(self) -> None:
        """Kill it."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for its exit, and release its file descriptor.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if not select.select([self._pidfd], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("the fork server", timeout or 0.0)
        os.close(self._pidfd)


def parent_environment(env: dict[str, str]) -> dict[str, str]:
    """Prepare the environment of the fork server itself, which its workers do not see.

    Its libraries must not start threads at import, as numpy's OpenBLAS would. Relative folders of the search path stay
    relative to this process's working directory.

    Args:
        env: environment of this process; it is changed.
    """
    env["OPENBLAS_NUM_THREADS"] = "1"
    if env.get("PYTHONPATH"):
        env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in env["PYTHONPATH"].split(os.pathsep))
    return env
