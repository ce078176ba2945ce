"""The torch elastic agent of one node, with workers forked from a preloaded parent.

Membership, rendezvous and the decision to relaunch are torch elastic's. What is our own: how workers are started and
ended, that a death is noticed at once, that the survivors of a fault are not asked to end but ended, since their state
is in the arenas, and that the workers of the next generation are told why there is one.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from string import Template
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs

from lightning_ckptless import environment
from lightning_ckptless.membership.fault import FaultReport, shell_code, split_exit
from lightning_ckptless.membership.generation import skip_generations
from lightning_ckptless.membership.parent import End, PreloadedParent, UnsafeForkError
from lightning_ckptless.membership.program import Program
from lightning_ckptless.membership.verdict import Verdict, take_begun, take_verdicts
from lightning_ckptless.membership.workers import Workers
from lightning_ckptless.torch_internals import forbid_restarts, forget_worker_store, remaining_restarts

Record = Callable[..., None]

_WAIT_S = 0.1
_FUTILE_STARTS = 3
_STORE_TIMEOUT_S = 60.0
_ROUNDS_KEY = "ckptless/rounds"


@dataclass(frozen=True, slots=True)
class Node:
    """What an agent needs beyond torch elastic's own settings.

    Args:
        name: unique in the run, the same as long as the agent lives.
        program: what the workers run.
        env: environment that all workers have in common.
        cwd: their working directory.
        fresh: start new interpreters instead of forking the preloaded parent.
        stop_grace_s: time between SIGTERM and SIGKILL where workers are asked to end.
        log_line_prefix: put before each line of a worker's output that is shown and logged at once; a template with
            `${role_name}`, `${rank}` and `${local_rank}`.
    """

    name: str
    program: Program
    env: Mapping[str, str]
    cwd: str
    fresh: bool
    stop_grace_s: float
    log_line_prefix: str | None = None


class CkptlessAgent(LocalElasticAgent):
    """A local elastic agent whose workers are forks of a preloaded parent.

    Args:
        spec: torch elastic's description of the workers.
        node: ours.
        parent: forks the workers; stays open.
        logs_specs: where their output goes.
        record: receives events, as `record(event, **fields)`.
    """

    def __init__(
        self, spec: WorkerSpec, node: Node, parent: PreloadedParent, logs_specs: LogsSpecs, record: Record
    ) -> None:
        super().__init__(spec, logs_specs)
        self.faults: list[FaultReport] = []
        self.exit_code = 0
        self._node = node
        self._parent = parent
        self._substitute: PreloadedParent | None = None
        self._record = record
        self._starts = 0
        self._futile_starts = 0
        self._verdict_folder = tempfile.TemporaryDirectory(prefix="ckptless-verdicts-")

    @property
    def relaunches(self) -> int:
        """How often the workers have been started again."""
        return max(0, self._starts - 1)

    def close(self) -> None:
        """Release what the agent has made for itself."""
        if self._substitute is not None:
            self._substitute.close()
        self._verdict_folder.cleanup()

    # ---------------------------------------------------------------- starting workers

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        handler = worker_group.spec.rdzv_handler
        forget_worker_store(handler)
        super()._rendezvous(worker_group)
        group_rank: int | None = worker_group.group_rank
        if group_rank == 0 and handler.use_agent_store:
            _number_generations(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        envs = {worker.local_rank: self._worker_env(worker_group, worker) for worker in worker_group.workers}
        take_verdicts(Path(self._verdict_folder.name))
        take_begun(Path(self._verdict_folder.name))
        self._pcontext = workers = self._fork(envs, self._line_prefixes(worker_group))
        pids = workers.pids()
        ranks = {worker.global_rank: pids[worker.local_rank] for worker in worker_group.workers}
        self._starts += 1
        self._record("workers_spawned", node=self._node.name, world_size=worker_group.workers[0].world_size, pids=ranks)
        if self.relaunches:
            self._announce(worker_group)
        return pids

    def _fork(self, envs: dict[int, dict[str, str]], prefixes: dict[int, str] | None) -> Workers:
        """Start the workers; with another parent, and then for good, where the preloaded one cannot be forked."""
        while True:
            workers = Workers(
                self._parent,
                self._node.program,
                envs,
                base_env=self._node.env,
                cwd=self._node.cwd,
                fresh=self._node.fresh,
                logs_specs=self._logs_specs,
                log_line_prefixes=prefixes,
            )
            self._pcontext = workers
            try:
                workers.start()
            except UnsafeForkError as error:
                workers.stop(signal.SIGKILL, 0)
                _say(f"workers are started afresh from now on, a relaunch takes longer: {error}")
                self._node = replace(self._node, fresh=True)
                self._parent = self._substitute = PreloadedParent(flags=self._parent.flags)
            else:
                return workers

    def _worker_env(self, worker_group: WorkerGroup, worker: Worker) -> dict[str, str]:
        spec = worker_group.spec
        env = {
            "LOCAL_RANK": str(worker.local_rank),
            "RANK": str(worker.global_rank),
            "GROUP_RANK": str(worker_group.group_rank),
            "ROLE_RANK": str(worker.role_rank),
            "ROLE_NAME": spec.role,
            "LOCAL_WORLD_SIZE": str(spec.local_world_size),
            "WORLD_SIZE": str(worker.world_size),
            "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
            "ROLE_WORLD_SIZE": str(worker.role_world_size),
            "MASTER_ADDR": str(worker_group.master_addr),
            "MASTER_PORT": str(worker_group.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(spec.max_restarts - remaining_restarts(self)),
            "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
            environment.AGENT: str(os.getpid()),
            environment.NODE: self._node.name,
            environment.SPAWNED_AT: repr(time.time()),
            environment.VERDICT_DIR: self._verdict_folder.name,
        }
        if self.faults:
            env[environment.FAULT_REPORT] = self.faults[-1].to_json()
        return env

    def _line_prefixes(self, worker_group: WorkerGroup) -> dict[int, str] | None:
        if self._node.log_line_prefix is None:
            return None
        template, role = Template(self._node.log_line_prefix), worker_group.spec.role
        return {
            worker.local_rank: template.safe_substitute(
                role_name=role, rank=worker.global_rank, local_rank=worker.local_rank
            )
            for worker in worker_group.workers
        }

    def _announce(self, worker_group: WorkerGroup) -> None:
        fault, size = self.faults[-1], worker_group.workers[0].world_size
        allowed = worker_group.spec.max_restarts
        number = (
            f"restart {allowed - remaining_restarts(self)} of {allowed}" if fault.rank is not None else "not counted"
        )
        self._record("relaunch", node=self._node.name, restart=fault.restart, world_size=size, cause=str(fault))
        _say(f"{fault}; all {size} workers relaunched, {number}")

    # ---------------------------------------------------------------- watching workers

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        workers = self._current_workers()
        # torch elastic sleeps between two looks; it is told to sleep next to nothing, and the wait is here instead.
        workers.wait_for_end(_WAIT_S)
        failed = workers.failed()
        if failed:
            self._handle_failure(worker_group, workers, failed)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state is WorkerState.SUCCEEDED:
            self.exit_code = 0
        return result

    def _handle_failure(self, worker_group: WorkerGroup, workers: Workers, failed: dict[int, End]) -> None:
        """Stop the survivors, in the way that suits what comes next, and put down what happened."""
        detected_at = time.time()
        ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
        final = _final_verdict(take_verdicts(Path(self._verdict_folder.name))) or self._judge_futile(ranks, failed)
        if final is not None:
            forbid_restarts(self)
        goes_on = remaining_restarts(self) > 0
        workers.stop(signal.SIGKILL if goes_on else signal.SIGTERM, 0.0 if goes_on else self._node.stop_grace_s)
        culprit, end = next(iter(failed.items()))
        spoken = [end for local, end in failed.items() if final is not None and ranks[local] == final.rank]
        self.exit_code = shell_code((spoken or [end])[0].exit_code)
        code, signal_name = split_exit(end.exit_code)
        fault = FaultReport(
            rank=ranks[culprit],
            pid=workers.pids()[culprit],
            exit_code=code,
            signal_name=signal_name,
            died_at=end.at,
            detected_at=detected_at,
            stopped_at=time.time(),
            restart=self._starts,
            world_size=worker_group.workers[0].world_size,
        )
        self._put_down(fault)
        if not goes_on:
            allowed = worker_group.spec.max_restarts
            _say(f"{fault}; {f'not relaunched: {final.reason}' if final else f'none of {allowed} restarts is left'}")

    def _judge_futile(self, ranks: dict[int, int], failed: dict[int, End]) -> Verdict | None:
        """A program that ends by itself again and again, with no step in between, is not helped by more starts."""
        culprit, end = next(iter(failed.items()))
        if take_begun(Path(self._verdict_folder.name)) or end.exit_code < 0:
            self._futile_starts = 0
            return None
        self._futile_starts += 1
        if self._futile_starts < _FUTILE_STARTS:
            return None
        reason = (
            f"{_FUTILE_STARTS} starts in a row ended with exit code {end.exit_code} before the program came to train"
        )
        return Verdict(ranks[culprit], final=True, reason=reason)

    def _put_down(self, fault: FaultReport) -> None:
        self.faults.append(fault)
        self._record("fault", node=self._node.name, **fault.fields())

    def _current_workers(self) -> Workers:
        assert isinstance(self._pcontext, Workers)
        return self._pcontext

    # ---------------------------------------------------------------- stopping workers

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        workers = self._current_workers()
        if workers.running:
            # Nobody failed here: nodes have come or gone. The state is in the arenas, so there is nothing to wait for.
            at = time.time()
            workers.stop(signal.SIGKILL, 0)
            size = worker_group.workers[0].world_size
            self._put_down(FaultReport(None, None, None, None, at, at, time.time(), self._starts, size))
        super()._stop_workers(worker_group)

    def _shutdown(self, *_: Any, **__: Any) -> None:
        """Ask running workers to end, whatever signal has ended the agent, and insist after our own grace time."""
        super()._shutdown(signal.SIGTERM, self._node.stop_grace_s)  # type: ignore[arg-type]


def _number_generations(worker_group: WorkerGroup) -> None:
    """Let the numbers of generations grow over the rounds of the rendezvous, each of which has a new store."""
    group: Any = worker_group  # torch declares its fields as None, which they are before the first rendezvous
    number = group.store.underlying_store.add(_ROUNDS_KEY, 1)
    timeout = timedelta(seconds=_STORE_TIMEOUT_S)
    skip_generations(TCPStore(group.master_addr, group.master_port, is_master=False, timeout=timeout), number - 1)


def _final_verdict(verdicts: tuple[Verdict, ...]) -> Verdict | None:
    return next((verdict for verdict in verdicts if verdict.final), None)


def _say(text: str) -> None:
    print(f"ckptless: {text}", file=sys.stderr, flush=True)
