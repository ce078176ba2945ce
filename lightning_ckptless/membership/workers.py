"""The workers of one agent in one generation, as torch elastic sees them."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Mapping
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import PContext, RunProcsResult
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from lightning_ckptless.membership.parent import End, Forked, ParentLostError, PreloadedParent
from lightning_ckptless.membership.program import Program
from lightning_ckptless.membership.worker import Job
from lightning_ckptless.torch_internals import start_tails

_KILL_WAIT_S = 60.0


class Workers(PContext):
    """Worker processes forked from a preloaded parent.

    Unlike torch's own contexts it installs no signal handlers, and `_poll` stops nobody: the agent decides how.

    Args:
        parent: forks the workers, and reports their ends.
        program: what each of them runs.
        envs: what each local rank's environment adds to `base_env`.
        base_env: the environment that all have in common.
        cwd: working directory.
        fresh: start new interpreters instead of running inside the forks.
        logs_specs: where stdout and stderr go.
        log_line_prefixes: put before each line that is shown and logged at once.
    """

    def __init__(
        self,
        parent: PreloadedParent,
        program: Program,
        envs: dict[int, dict[str, str]],
        *,
        base_env: Mapping[str, str],
        cwd: str,
        fresh: bool,
        logs_specs: LogsSpecs,
        log_line_prefixes: dict[int, str] | None = None,
    ) -> None:
        args: dict[int, tuple[Any, ...]] = dict.fromkeys(envs, ())
        super().__init__("worker", program.target, args, envs, logs_specs, log_line_prefixes)
        self._parent = parent
        # After super().__init__, which adds the name of each worker's error file to `envs`.
        self._jobs = {rank: Job(program, {**base_env, **env}, cwd, fresh) for rank, env in envs.items()}
        self._started: dict[int, Forked] = {}
        self._running: set[int] = set()
        self._ends: dict[int, End] = {}
        self._stopped: set[int] = set()

    def start(self) -> None:
        """Start all workers."""
        self._start()
        start_tails(self)

    def _start(self) -> None:
        for rank, job in self._jobs.items():
            stdio = self._open_stdio(rank)
            try:
                self._started[rank] = self._parent.fork(job, stdio)
            finally:
                for file in stdio[1:]:
                    if file > 2:
                        os.close(file)
            self._running.add(rank)

    def _open_stdio(self, rank: int) -> list[int]:
        mode = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        files = [0]
        for number, path in ((1, self.stdouts[rank]), (2, self.stderrs[rank])):
            files.append(os.open(path, mode, 0o644) if path else number)
        return files

    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""
        return {rank: worker.pid for rank, worker in self._started.items()}

    @property
    def running(self) -> int:
        """How many have not been seen to end."""
        return len(self._running)

    def wait_for_end(self, timeout_s: float) -> bool:
        """Wait until a worker ends that has not been seen to end, at most `timeout_s`. Returns whether one did."""
        if not self._running:
            return False
        ranks = {self._started[rank].pidfd: rank for rank in self._running}
        poll = select.poll()
        for pidfd in ranks:
            poll.register(pidfd, select.POLLIN)
        ended = [ranks[pidfd] for pidfd, _ in poll.poll(timeout_s * 1000)]
        for rank in ended:
            self._put_down(rank)
        return bool(ended)

    def _put_down(self, rank: int) -> None:
        worker = self._started[rank]
        self._running.remove(rank)
        os.close(worker.pidfd)
        try:
            self._ends[rank] = self._parent.end_of(worker)
        except ParentLostError:
            self._ends[rank] = End(-signal.SIGKILL, time.time())

    def failed(self) -> dict[int, End]:
        """Workers that failed by themselves, by local rank, in the order of their deaths."""
        ends = {rank: end for rank, end in self._ends.items() if end.exit_code != 0 and rank not in self._stopped}
        return dict(sorted(ends.items(), key=lambda item: item[1].at))

    def stop(self, death_signal: int, grace_s: float) -> None:
        """End all workers that still run, and wait until they are gone.

        Args:
            death_signal: what is sent at first.
            grace_s: after so long, SIGKILL is sent.
        """
        while self.wait_for_end(0):
            pass
        self._stopped |= self._running
        self._signal_running(death_signal)
        self._wait_all(grace_s)
        if self._running and death_signal != signal.SIGKILL:
            self._signal_running(signal.SIGKILL)
        # Beyond this a process is stuck in the kernel, and waiting for it would only wedge the agent as well.
        self._wait_all(_KILL_WAIT_S)

    def _signal_running(self, number: int) -> None:
        self._parent.signal([self._started[rank].pid for rank in self._running], number)

    def _wait_all(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._running and (remaining_s := deadline - time.monotonic()) > 0:
            self.wait_for_end(remaining_s)

    def _poll(self) -> RunProcsResult | None:
        while self.wait_for_end(0):
            pass
        failed = self.failed()
        if self._running and not failed:
            return None
        failures = {
            rank: ProcessFailure(rank, self._started[rank].pid, end.exit_code, self.error_files[rank])
            for rank, end in failed.items()
        }
        return RunProcsResult(dict.fromkeys(range(self.nprocs)), failures, self.stdouts, self.stderrs)

    def _close(self, death_sig: signal.Signals, timeout: float = 30) -> None:
        self.stop(death_sig, timeout)
