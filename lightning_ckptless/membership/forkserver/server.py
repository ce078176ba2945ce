"""The fork server: a process that has imported what workers need, and forks them.

Importing torch and Lightning takes most of the time of a relaunch, so it is done once, here. The fork server never
trains, never joins a process group and never starts a thread; otherwise its forks would not be clean processes. An
agent starts it and sends it requests over a socket. It owns the workers: only the fork server signals and reaps them,
so that no signal can hit a process id that was reused. When the agent closes the socket or dies, the workers are killed
and the fork server exits.

| Request | Answer |
|---|---|
| `{"preload": [names], "path": [folders]}` | `{"ready": seconds}` or `{"failed": sentence}` |
| `{"fork": job}` with stdin, stdout, stderr, channel | `{"pid": n}` with a pidfd, or `{"refused": sentence}` |
| the same, at a limit of the system | `{"impossible": sentence}` |
| `{"signal": number, "pids": [...]}`, to groups, or with `"alone": true` to processes | none |
| `{"succeed": true}` with a socket | `{"pid": n}` with a pidfd: a fork that serves at that socket, like this one |
| `{"learn": request}`, to such a fork | `{"learned": modules, "unsafe": {...}, "took_s": s}`; see `import_learning` |

Without a request, `{"ended": pid, "exit_code": n, "at": seconds}` is sent when a worker exits, `at` being wall clock.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field

from lightning_ckptless.membership.channel import socket_messages
from lightning_ckptless.membership.forkserver.import_watch import foreign_threads
from lightning_ckptless.membership.worker import hidden_output, startup
from lightning_ckptless.membership.worker.startup import Job


def unsafe_to_fork() -> str | None:
    """Explain why a fork of this process would not be a clean worker; None when it would."""
    if threads := foreign_threads():
        return f"an imported module has started threads: {', '.join(threads.values())}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "an imported module has initialized CUDA"
    return None


def _fork() -> int:
    # Python warns about every thread, even those known to be harmless.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def loses_cuda() -> bool:
    """Whether forks of this process cannot use CUDA; a module that merely counts the devices suffices."""
    if "torch" not in sys.modules or sys.modules["torch"].version.cuda is None:
        return False
    from lightning_ckptless.internals.torch_internals import cuda_was_lost_by_fork  # noqa: PLC0415 - needs torch

    pid = _fork()
    if pid == 0:
        os._exit(int(cuda_was_lost_by_fork()))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0


def import_all(names: list[str], path: list[str]) -> str | None:
    """Import modules, looking in `path` first.

    Returns:
        Which modules could not be imported, and why; None on success.
    """
    before = sys.path[:]
    sys.path[:0] = path
    failures = [failure for name in names if (failure := _import(name)) is not None]
    sys.path[:] = before
    gc.collect()
    gc.freeze()
    return "; ".join(failures) or None


def _import(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"cannot preload {name}: {error}"
    return None


@dataclass
class Parent:
    """The serving loop of the fork server.

    Args:
        control: the socket to the agent.
        agent_pid: the process at its other end.
        refuses: whether it refuses forks that would not be clean processes.
        is_fork: whether it was forked by another fork server, with which it exits.
    """

    control: socket.socket
    agent_pid: int
    refuses: bool = True
    is_fork: bool = False
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    pidfds: dict[int, int] = field(default_factory=dict)
    loses_cuda: bool = False
    variables: dict[str, str | None] = field(default_factory=dict)

    def serve(self) -> Job | Parent | None:
        """Serve until the agent exits; returns None, or in a fork what that runs: a job, or a serving loop."""
        agent = os.pidfd_open(self.agent_pid)
        self.selector.register(self.control, selectors.EVENT_READ)
        self.selector.register(agent, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in self.selector.select()}
            for pid in [pid for pid, pidfd in self.pidfds.items() if pidfd in ready]:
                self._reap(pid)
            if self.control.fileno() in ready:
                request = socket_messages.receive(self.control)
                if request is None:
                    break
                role = self._answer(*request)
                if role is not None:
                    os.close(agent)
                    return role
            elif agent in ready:
                break
        self._kill_all()
        return None

    def _answer(self, request: socket_messages.Message, files: list[int]) -> Job | Parent | None:
        if "fork" in request:
            return self._fork(Job.from_message(request["fork"]), files)
        if "succeed" in request:
            return self._fork_successor(files)
        if "learn" in request:
            self._learn(request["learn"])
            return None
        if "preload" in request:
            self._preload(request["preload"], request["path"])
        else:
            self._signal(request["signal"], request["pids"], alone=request.get("alone", False))
        return None

    def _preload(self, names: list[str], path: list[str]) -> None:
        began = time.monotonic()
        # No event is read during an import, so the kernel must ensure that the fork server does not outlive its agent.
        startup.die_with(self.agent_pid)
        failure = import_all(names, path)
        if not self.is_fork:
            startup.outlive_parent()
        self.loses_cuda = self.loses_cuda or loses_cuda()
        self._send({"ready": time.monotonic() - began} if failure is None else {"failed": failure})

    def _fork(self, job: Job, files: list[int]) -> Job | None:
        """Fork a worker. Returns its job in the worker, None in the fork server."""
        refusal = self._refusal() if self.refuses and not job.fresh else None
        if refusal is not None:
            socket_messages.close_all(files)
            self._send({"refused": refusal})
            return None
        parent_pid = os.getpid()
        if not self._begin_child(files):
            return None
        startup.detach(parent_pid, files[:3])
        startup.pass_channel(job, files[3:])
        hidden_output.hide(job.env, inheritable=job.fresh)
        if job.fresh:
            startup.execute(job)
        return job.with_variables(self.variables)

    def _fork_successor(self, files: list[int]) -> Parent | None:
        parent_pid = os.getpid()
        if not self._begin_child(files):
            return None
        # The first worker has already printed what these imports print.
        startup.detach(parent_pid, [os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC) for _ in range(3)])
        return Parent(socket.socket(fileno=files[0]), self.agent_pid, is_fork=True)

    def _begin_child(self, files: list[int]) -> bool:
        """Fork, and report that to the agent. Returns whether this is the new process, which owns the files."""
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = _fork()
        except OSError as error:
            # At a limit on processes or memory. Running workers are not affected.
            socket_messages.close_all(files)
            self._send({"impossible": str(error)})
            return False
        if pid == 0:
            self._release()
            return True
        socket_messages.close_all(files)
        self.pidfds[pid] = os.pidfd_open(pid)
        self.selector.register(self.pidfds[pid], selectors.EVENT_READ)
        self._send({"pid": pid}, [self.pidfds[pid]])
        return False

    def _learn(self, message: socket_messages.Message) -> None:
        # Imported late: workers must not inherit this module.
        from lightning_ckptless.membership.forkserver.import_learning import ImportRequest, learn  # noqa: PLC0415

        learned = learn(ImportRequest.from_message(message))
        self.variables, self.loses_cuda = learned.variables, loses_cuda()
        unfit = "" if learned.unsafe else self._refusal() or ""
        answer = {"learned": learned.modules, "unsafe": learned.unsafe, "unfit": unfit, "took_s": learned.took_s}
        self._send(answer)

    def _refusal(self) -> str | None:
        return "an imported module has asked CUDA for its devices" if self.loses_cuda else unsafe_to_fork()

    def _release(self) -> None:
        """In the forked process: close what belongs to the fork server."""
        self.selector.close()
        self.control.close()
        socket_messages.close_all(list(self.pidfds.values()))

    def _signal(self, number: int, pids: list[int], *, alone: bool) -> None:
        for pid in pids:
            if pid in self.pidfds:
                if alone:
                    os.kill(pid, number)
                else:
                    _signal_group(pid, number)

    def _reap(self, pid: int) -> None:
        """Report a worker that has exited, and kill what it has left behind if it failed."""
        at = time.time()
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        if (ended.si_code, ended.si_status) != (os.CLD_EXITED, 0):
            # The zombie still holds the process id, so this cannot hit another process.
            _signal_group(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        pidfd = self.pidfds.pop(pid)
        self.selector.unregister(pidfd)
        os.close(pidfd)
        self._send({"ended": pid, "exit_code": os.waitstatus_to_exitcode(status), "at": at})

    def _send(self, message: socket_messages.Message, files: tuple[int, ...] | list[int] = ()) -> None:
        # If the agent has exited, the loop notices it at the socket next.
        with suppress(BrokenPipeError, ConnectionResetError):
            socket_messages.send(self.control, message, files)

    def _kill_all(self) -> None:
        for pid in self.pidfds:
            _signal_group(pid, signal.SIGKILL)
        for pid in self.pidfds:
            os.waitpid(pid, 0)


def _signal_group(pid: int, number: int) -> None:
    """Signal a worker that is not yet reaped, and the processes it has started."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        # Just forked: it does not lead its own group yet.
        os.kill(pid, number)


def main() -> int:
    """Serve an agent. Returns in each worker, when it is done."""
    options = argparse.ArgumentParser()
    options.add_argument("--fd", type=int, required=True)
    options.add_argument("--agent", type=int, required=True)
    arguments = options.parse_args()
    if not sys.flags.safe_path:
        # The folder of this package; a worker inserts the folder of its script here.
        del sys.path[0]
    control = socket.socket(fileno=arguments.fd)
    control.set_inheritable(False)
    role: Job | Parent | None = Parent(control, arguments.agent)
    while isinstance(role, Parent):
        role = role.serve()
    if role is None:
        os._exit(0)
    return startup.run(role)


if __name__ == "__main__":
    sys.exit(main())
