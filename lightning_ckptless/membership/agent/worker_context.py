"""The workers of one agent as torch elastic sees them: log files, outcome and end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.elastic.multiprocessing.api import LogsSpecs, PContext, RunProcsResult
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from lightning_ckptless.internals.torch_internals import start_tails
from lightning_ckptless.membership.agent.process_control import ProcessControl
from lightning_ckptless.membership.agent.workers import WorkerGroup
from lightning_ckptless.membership.worker.startup import Job


class WorkerContext(PContext):
    """Torch elastic's view of a `WorkerGroup`.

    Unlike torch's own contexts it installs no signal handlers, and `_poll` stops no process: the agent decides how.

    Args:
        control: starts the processes, and waits for them.
        envs: what each local rank's environment adds to that of all workers.
        make_job: returns what a worker with such an environment runs.
        logs_specs: where stdout and stderr go.
        log_line_prefixes: prefix of each line that is both shown and logged.
        first_wait_s: see `WorkerGroup`.

    Attributes:
        workers: the processes.
    """

    def __init__(
        self,
        control: ProcessControl,
        envs: Mapping[int, Mapping[str, str]],
        make_job: Callable[[Mapping[str, str]], Job],
        logs_specs: LogsSpecs,
        *,
        log_line_prefixes: dict[int, str] | None = None,
        first_wait_s: float = 0.0,
    ) -> None:
        args: dict[int, tuple[Any, ...]] = dict.fromkeys(envs, ())
        named = {rank: dict(env) for rank, env in envs.items()}
        super().__init__("worker", "", args, named, logs_specs, log_line_prefixes)
        # After super().__init__, which adds the name of each worker's error file to `named`.
        jobs = {rank: make_job(env) for rank, env in named.items()}
        self.workers = WorkerGroup(control, jobs, stdouts=self.stdouts, stderrs=self.stderrs, first_wait_s=first_wait_s)

    def start(self) -> None:
        """Start all workers, and the threads that show what they write to their log files."""
        self._start()
        start_tails(self)

    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""
        return self.workers.pids()

    def _start(self) -> None:
        self.workers.start()

    def _poll(self) -> RunProcsResult | None:
        # Report only what was polled before: the agent has decided on that basis.
        failed, pids = self.workers.failed(), self.pids()
        if self.workers.running and not failed:
            return None
        failures = {
            rank: ProcessFailure(rank, pids[rank], end.exit_code, self.error_files[rank])
            for rank, end in failed.items()
        }
        return RunProcsResult(dict.fromkeys(range(self.nprocs)), failures, self.stdouts, self.stderrs)

    def _close(self, death_sig: signal.Signals, timeout: float = 30) -> None:
        self.workers.close(death_sig, timeout)
