"""The torch elastic agent of one node, with workers forked from a fork server.

torch elastic provides node membership and rendezvous. This module adds how workers are started and stopped, immediate
detection of a death, and the recovery order: in place if possible, otherwise a relaunch. In place, only the lost ranks
are replaced and the survivors continue. In a relaunch the survivors are killed rather than asked to exit, because their
state is in the arenas, and all workers are started again.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous.api import RendezvousError

from lightning_ckptless import environment
from lightning_ckptless.console import CONSOLE
from lightning_ckptless.errors import TimeLimitError, UnfitNodeError
from lightning_ckptless.internals.torch_internals import forbid_restarts
from lightning_ckptless.membership.agent.hang_watch import HangWatch, LateExits
from lightning_ckptless.membership.agent.held_memory import HeldMemory
from lightning_ckptless.membership.agent.in_place import InPlaceRecovery
from lightning_ckptless.membership.agent.logs import LogFiles
from lightning_ckptless.membership.agent.loop_end import LoopEnd
from lightning_ckptless.membership.agent.positions import Positions
from lightning_ckptless.membership.agent.scratch import ScratchFolder
from lightning_ckptless.membership.agent.signals import AskedToEnd
from lightning_ckptless.membership.agent.workers import Workers
from lightning_ckptless.membership.channel.agent_channel import FromWorker
from lightning_ckptless.membership.channel.exit_report import ExitReport, final_report, take_begun, take_exit_reports
from lightning_ckptless.membership.channel.fault_report import FaultReport, shell_code, split_exit
from lightning_ckptless.membership.channel.program_failure import Failure, failure_of
from lightning_ckptless.membership.forkserver.client import End, ForkServer
from lightning_ckptless.membership.forkserver.fallback import ForkFallback
from lightning_ckptless.membership.forkserver.imported import Imported
from lightning_ckptless.membership.forkserver.learning import ImportRequest
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.forkserver.sidecar import END_GRACE_S, SidecarLauncher, Sidecars
from lightning_ckptless.membership.rendezvous.regrouping import Regroupings
from lightning_ckptless.membership.rendezvous.rounds import (
    line_prefixes,
    number_generations,
    variables_of,
    worker_store,
)
from lightning_ckptless.membership.worker.hydra import FIRST_WAIT_S, imports_hydra
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.membership.worker.progress import step_begun
from lightning_ckptless.protocol.crash_loop import ProgramEnd, Stage, Starts, judge_end
from lightning_ckptless.protocol.hang_detection import Hang
from lightning_ckptless.protocol.messages import ProgramImported, ReachedTrainer, RunOver
from lightning_ckptless.protocol.newcomer import Imports
from lightning_ckptless.protocol.recovery import RecoveryPlan, Rung, Situation, plan_recovery
from lightning_ckptless.protocol.retry_policy import RecoveryHistory, RecoveryLimits, why_no_recovery
from lightning_ckptless.system.control_groups import OomKills

Record = Callable[..., None]

_WAIT_S = 0.1


@dataclass(frozen=True, slots=True)
class Node:
    """What an agent needs beyond torch elastic's own settings.

    Args:
        name: unique in the run, constant for the life of the agent.
        program: what the workers run.
        env: environment that all workers share.
        cwd: their working directory.
        fresh: start new interpreters instead of forking the fork server.
        stop_grace_s: time between SIGTERM and SIGKILL, in seconds, where workers are asked to exit.
        finish_grace_s: time in seconds for workers to finish a step and save when the agent is asked to end.
        exit_grace_s: time in seconds between an exception that ends a worker's script and the exit of its process.
        max_restarts: recoveries in the life of the agent; None for any number.
        max_recoveries_without_progress: recoveries in a row without a new committed step; None to leave it to the
            strategy of the workers.
        max_recoveries_per_hour: recoveries within an hour; None to leave it to the strategy.
        in_place: whether survivors recover in place; None to leave it to the strategy of the workers.
        standbys: processes that wait for a rank; None to leave it to the strategy.
        preload_imports: whether new processes preload what the script imports; None to leave it to the strategy.
        log_line_prefix: prefix of each line of worker output that is both shown and logged; a template with
            `${role_name}`, `${rank}` and `${local_rank}`.
        time_limit_s: time in seconds from the agent's start after which the run is ended; None for no limit.
        newcomer_outputs: folder for the output of new processes until they have joined the other ranks; None for a
            temporary one.
    """

    name: str
    program: Program
    env: Mapping[str, str]
    cwd: str
    fresh: bool
    stop_grace_s: float
    finish_grace_s: float
    exit_grace_s: float
    max_restarts: int | None = None
    max_recoveries_without_progress: int | None = None
    max_recoveries_per_hour: int | None = None
    in_place: bool | None = None
    standbys: int | None = None
    preload_imports: bool | None = None
    log_line_prefix: str | None = None
    time_limit_s: float | None = None
    newcomer_outputs: Path | None = None

    def limits(self, asked: RecoveryLimits) -> RecoveryLimits:
        """Return how often the run may recover.

        Args:
            asked: limits of the workers' strategy; those of the command line take precedence.
        """
        without_progress, per_hour = self.max_recoveries_without_progress, self.max_recoveries_per_hour
        return RecoveryLimits(
            asked.without_progress if without_progress is None else without_progress,
            asked.per_hour if per_hour is None else per_hour,
            self.max_restarts,
        )


class CkptlessAgent(LocalElasticAgent):
    """A local elastic agent whose workers are forks of a fork server.

    Args:
        spec: torch elastic's description of the workers.
        node: our own.
        parent: fork server of the workers; stays open.
        logs_specs: where their output goes.
        record: receives events, as `record(event, **fields)`.
        after: previous agent of this node, whose rendezvous was lost.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        node: Node,
        parent: ForkServer,
        logs_specs: LogFiles,
        record: Record,
        after: CkptlessAgent | None = None,
    ) -> None:
        super().__init__(spec, logs_specs)
        self._log_files = logs_specs
        self.faults: list[FaultReport] = [] if after is None else after.faults_with_rendezvous_lost()
        self.exit_code = 0
        self.has_given_up = False
        self.recoveries_in_place = 0
        self._node = node
        self._forks = ForkFallback(parent, fresh=node.fresh, record=record, say=CONSOLE.say)
        self._record = record
        self._memory: HeldMemory = after._memory if after is not None else HeldMemory(node.name, record, CONSOLE.say)
        self._starts = 0 if after is None else 1
        self._started_at = time.monotonic()
        self._history = RecoveryHistory() if after is None else after.history
        self._program_starts = Starts()
        self._oom_kills = OomKills()
        self._out_of_memory = ""
        self._reason = ""
        self._unresolved: list[FaultReport] = []
        self._hydra: str = "" if after is None else after._hydra
        self._lost_at = 0.0
        self._scratch = ScratchFolder("agent")
        self._folder = self._scratch.path
        self._hangs = HangWatch(self._folder, record, CONSOLE.say)
        self._late_exits = LateExits(self._folder, node.exit_grace_s)
        where = SidecarLauncher(lambda: self._parent, node.env, node.cwd, node.program.flags, node.fresh)
        self._sidecars = Sidecars(where, record, CONSOLE.say)
        self._in_place = InPlaceRecovery(
            in_place=node.in_place,
            standbys=node.standbys,
            preload_imports=node.preload_imports,
            folder=self._folder,
            outputs=node.newcomer_outputs or self._folder,
            record=record,
            say=CONSOLE.say,
        )

    @property
    def _parent(self) -> ForkServer:
        return self._forks.parent

    @property
    def history(self) -> RecoveryHistory:
        """The recoveries of the run so far."""
        return self._history

    @property
    def has_started(self) -> bool:
        """Whether its workers have been started."""
        return self._pcontext is not None

    def faults_with_rendezvous_lost(self) -> list[FaultReport]:
        """The faults it has seen, with the loss of the rendezvous as the last one."""
        at, size = time.time(), self.get_worker_group().workers[0].world_size
        return [*self.faults, FaultReport(None, None, None, None, at, at, at, len(self.faults) + 1, size)]

    @property
    def relaunches(self) -> int:
        """How often all workers have been started again."""
        return max(0, self._starts - 1)

    def close(self) -> None:
        """Release the agent's resources, except the memory it holds for workers: the next agent adopts that."""
        self._forks.close()
        self._scratch.remove()

    def release_memory(self) -> None:
        """Release the memory held for workers; called when no further agent follows in this process."""
        self._memory.close()

    # ---------------------------------------------------------------- starting workers

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        handler = worker_group.spec.rdzv_handler
        super()._rendezvous(worker_group)
        group_rank: int | None = worker_group.group_rank
        self._meeting_store = worker_store(worker_group)
        if group_rank == 0 and handler.use_agent_store:
            number_generations(worker_group, self._meeting_store)
        nodes = int(worker_group.group_world_size or 1)
        self._regroupings = Regroupings(self._meeting_store, nodes)
        self._take_positions(worker_group, range(nodes))

    def _take_positions(self, worker_group: WorkerGroup, peers: Collection[int]) -> None:
        """Begin to exchange positions with the nodes whose workers train together with those of this one."""
        node: int = worker_group.group_rank or 0
        ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
        self._positions = Positions(self._meeting_store, node, peers, ranks)
        self._hangs.begin_round(self._positions)
        self._loop_end = LoopEnd(self._hangs, self._positions)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        envs = {worker.local_rank: self._worker_env(worker_group, worker) for worker in worker_group.workers}
        take_exit_reports(self._folder)
        self._take_progress()
        for local in envs:
            self._hangs.forget(local)
        prefixes = line_prefixes(worker_group, self._node.log_line_prefix)
        workers = self._forks.start(lambda: self._make_workers(envs, prefixes))
        pids = workers.pids()
        ranks = {worker.global_rank: pids[worker.local_rank] for worker in worker_group.workers}
        self._starts += 1
        self._in_place.begin_round(self._regroupings, lambda stdio: self._start_standby(worker_group, stdio))
        self._record("workers_spawned", node=self._node.name, world_size=worker_group.workers[0].world_size, pids=ranks)
        if self.relaunches:
            self._announce(worker_group)
        return pids

    def _make_workers(self, envs: dict[int, dict[str, str]], prefixes: dict[int, str] | None) -> Workers:
        workers = Workers(
            lambda: self._parent,
            self._node.program,
            {rank: dict(env) for rank, env in envs.items()},
            base_env=self._node.env,
            cwd=self._node.cwd,
            fresh=self._forks.fresh,
            logs_specs=self._logs_specs,
            log_line_prefixes=prefixes,
            first_wait_s=self._first_wait_s(),
        )
        # Set before they start, so that an interrupted start stops those already running.
        self._pcontext = workers
        return workers

    def _first_wait_s(self) -> float:
        is_named = bool(self._hydra) or environment.HYDRA in self._node.env
        return 0.0 if is_named or not imports_hydra(self._node.program, Path(self._node.cwd)) else FIRST_WAIT_S

    def _start_standby(self, worker_group: WorkerGroup, stdio: list[int]) -> Process:
        # Its rank is not known yet. The last rank is a placeholder, and speaks for no node.
        last = worker_group.workers[-1]
        env = {**self._worker_env(worker_group, last), environment.STANDBY: "1"}
        job = self._current_workers().job(last.local_rank, env)
        return Process.start(self._parent, job, stdio)

    def _kept_for(self, worker_group: WorkerGroup, worker: Worker) -> dict[str, str]:
        root = self._node.env.get(environment.RUN_ROOT)
        if worker.global_rank or root is None:
            return {}
        return environment.kept_for_rank_zero(Path(root) / worker_group.spec.rdzv_handler.get_run_id())

    def _worker_env(self, worker_group: WorkerGroup, worker: Worker) -> dict[str, str]:
        env = {
            **variables_of(worker_group, worker, restarts=self._history.count),
            environment.AGENT: str(os.getpid()),
            environment.NODE: self._node.name,
            environment.SPAWNED_AT: repr(time.time()),
            environment.AGENT_DIR: str(self._folder),
            environment.IMPORTS: str(self._imports),
        }
        if self._hydra:
            env[environment.HYDRA] = self._hydra
        if self._starts or self.faults:
            env |= self._kept_for(worker_group, worker)
        if self.faults:
            env[environment.FAULT_REPORT] = self.faults[-1].to_json()
        return env

    @property
    def _imports(self) -> Imports:
        is_off = self._forks.fresh or not self._in_place.learns_imports
        return Imports.OFF if is_off else self._forks.succession.state

    def _announce(self, worker_group: WorkerGroup) -> None:
        fault, size = self.faults[-1], worker_group.workers[0].world_size
        number = str(self._history) if fault.rank is not None else "not counted as a recovery"
        self._record(
            "relaunch",
            node=self._node.name,
            restart=fault.restart,
            world_size=size,
            cause=str(fault),
            reason=self._reason,
        )
        CONSOLE.say(f"{fault}; all {size} workers relaunched, {number} ({self._reason})")

    # ---------------------------------------------------------------- watching workers

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        workers = self._current_workers()
        # torch elastic sleeps between two polls. Its interval is set to almost nothing, and the wait is here instead.
        workers.watch(self._loop_end.pause_s(_WAIT_S))
        self._enforce_time_limit()
        received = workers.receive()
        for _, message, _ in received:
            if isinstance(message, ReachedTrainer):
                self._hydra = self._hydra or message.hydra
        self._in_place.receive(received)
        self._sidecars.maintain(received)
        self._memory.maintain(received)
        self._hangs.receive(received)
        self._hangs.limit_s = self._in_place.hang_timeout_s
        self._in_place.follow(workers)
        self._late_exits.poll(workers)
        hang = self._hangs.poll(workers) or self._in_place.poll()
        has_recovered = bool(self.faults or self._in_place.number)
        if hang is not None and not self._loop_end.explains_hang(workers, has_recovered=has_recovered):
            self._hangs.kill(hang, workers)
        elif (late := self._poll_meeting(workers)) is not None:
            self._hangs.kill(late, workers)
        lost = workers.lost()
        for local in lost:
            self._in_place.show_output_of(local)
        if lost and self._recover(worker_group, workers, lost) is Rung.IN_PLACE:
            return RunResult(state=WorkerState.HEALTHY)
        self._loop_end.maintain(
            workers, number=self._in_place.number, may_end=self._may_end, has_recovered=has_recovered
        )
        self._in_place.maintain_standbys()
        self._maintain_successor(received, workers)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state is WorkerState.SUCCEEDED:
            self.exit_code = 0
        return result

    def _maintain_successor(self, received: Sequence[FromWorker], workers: Workers) -> None:
        """Have a successor of the fork server import what the script imports, for processes that are forked later."""
        for local, message, _ in received:
            if isinstance(message, ProgramImported) and self._in_place.learns_imports:
                imported = Imported(message.modules, message.variables, message.path)
                self._forks.succession.learn(ImportRequest(imported, workers.job(local, {})))
        if self._in_place.trains:
            self._forks.maintain()

    def _poll_meeting(self, workers: Workers) -> Hang | None:
        late = self._hangs.poll_meeting(self._in_place.meeting(workers), workers)
        # Ranks that were already killed are about to exit.
        return None if late is None or any(workers.hang_reason(rank) for rank in late.ranks) else late

    def _enforce_time_limit(self) -> None:
        limit_s = self._node.time_limit_s
        if limit_s is not None and time.monotonic() - self._started_at > limit_s:
            raise TimeLimitError(f"the run did not end within its time limit of {limit_s:.0f} s; stopping its workers")

    def _may_end(self) -> bool:
        """Whether workers that have made their last step may leave the training loop."""
        return True

    def _recover(self, worker_group: WorkerGroup, workers: Workers, lost: dict[int, End | None]) -> Rung:
        """Decide how to recover from the loss of workers, and do it."""
        at = time.time()
        ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
        has_stepped = self._take_progress()
        self._out_of_memory = self._oom_kills.news()
        exit_report = final_report(take_exit_reports(self._folder)) or self._judge_end(
            ranks, workers, lost, has_stepped=has_stepped
        )
        if exit_report is not None and exit_report.unfit:
            workers.stop(signal.SIGKILL, 0.0)
            raise UnfitNodeError(exit_report.reason)
        plan = plan_recovery(
            Situation(
                lost=tuple(ranks[local] for local in lost),
                world_size=worker_group.workers[0].world_size,
                final=None if exit_report is None else exit_report.reason,
                exhausted=why_no_recovery(self._history, self._node.limits(self._in_place.limits), time.monotonic()),
                in_place=self._in_place.is_wanted,
                obstacle=self._in_place.obstacle,
                outside={ranks[local]: workers.stages[local] for local in ranks if local not in workers.inside},
                tries=self._in_place.tries,
            )
        )
        if plan.rung is not Rung.END:
            self._history = self._history.after_recovery(time.monotonic())
        if plan.rung is Rung.IN_PLACE:
            self._recover_in_place(worker_group, workers, lost, at, plan)
        else:
            self._stop_survivors(worker_group, workers, lost, at, plan, exit_report)
        return plan.rung

    def _recover_in_place(
        self, worker_group: WorkerGroup, workers: Workers, lost: dict[int, End | None], at: float, plan: RecoveryPlan
    ) -> None:
        """Replace the lost ranks while the survivors stay in the training loop."""
        self.recoveries_in_place += 1
        fault = self._report(worker_group, workers, lost, at)
        regrouping = self._in_place.open(fault)
        by_local = {worker.local_rank: worker for worker in worker_group.workers}
        for local in lost:
            self._hangs.forget(local)
        how = self._in_place.replace(
            workers, list(lost), regrouping, lambda local: self._worker_env(worker_group, by_local[local])
        )
        for local, pid in workers.pids().items():
            by_local[local].id = pid
        self._record_fault(fault)
        new = {by_local[local].global_rank: (by_local[local].id, who) for local, who in how.items()}
        self._record(
            "in_place",
            node=self._node.name,
            regrouping=regrouping.number,
            reason=plan.reason,
            cause=str(fault),
            new=new,
        )
        replacements = {who for _, who in new.values()}
        if len(replacements) > 1:
            replacements = {", ".join(f"rank {rank}: {who}" for rank, (_, who) in new.items())}
        CONSOLE.say(f"{fault}; {plan.reason} ({replacements.pop()})")

    def _report(
        self, worker_group: WorkerGroup, workers: Workers, lost: dict[int, End | None], detected_at: float
    ) -> FaultReport:
        culprit, end = next(iter(lost.items()))
        code, signal_name = (None, None) if end is None else split_exit(end.exit_code)
        return FaultReport(
            rank=next(worker.global_rank for worker in worker_group.workers if worker.local_rank == culprit),
            pid=workers.pids()[culprit],
            exit_code=code,
            signal_name=signal_name,
            died_at=detected_at if end is None else end.at,
            detected_at=detected_at,
            stopped_at=time.time(),
            restart=len(self.faults) + 1,
            world_size=worker_group.workers[0].world_size,
            hung=workers.hang_reason(culprit),
            earlier=tuple(str(fault) for fault in self._unresolved),
            recovering_since=self._unresolved[0].died_at if self._unresolved else None,
            out_of_memory=self._out_of_memory,
        )

    def _stop_survivors(
        self,
        worker_group: WorkerGroup,
        workers: Workers,
        lost: dict[int, End | None],
        at: float,
        plan: RecoveryPlan,
        exit_report: ExitReport | None,
    ) -> None:
        """Stop all workers in the way that suits what comes next, and record what happened."""
        relaunches = plan.rung is Rung.RELAUNCH
        if not relaunches:
            forbid_restarts(self)
            self.has_given_up = exit_report is None or exit_report.keeps_state
            workers.send(RunOver())
        workers.stop(signal.SIGKILL if relaunches else signal.SIGTERM, 0.0 if relaunches else self._node.stop_grace_s)
        failed = workers.failed()
        ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
        lost = {local: failed.get(local, end) for local, end in lost.items()}
        reported = [end for local, end in lost.items() if exit_report is not None and ranks[local] == exit_report.rank]
        end = (reported or list(lost.values()))[0]
        self.exit_code = shell_code(-signal.SIGKILL if end is None else end.exit_code) or 1
        culprit = next(iter(lost))
        if workers.hang_reason(culprit) and failure_of(self._folder, workers.pids()[culprit]) is not None:
            # Its script had failed before it was killed for not exiting.
            self.exit_code = 1
        fault = self._report(worker_group, workers, lost, at)
        self._record_fault(fault)
        self._reason = plan.reason
        if not relaunches:
            CONSOLE.say(f"{fault}; {plan.reason}")

    def _take_progress(self) -> bool:
        """Whether a new step has been committed since the last call."""
        has_stepped = take_begun(self._folder)
        if has_stepped:
            self._history = self._history.after_progress()
            self._unresolved.clear()
        return has_stepped

    def _judge_end(
        self, ranks: dict[int, int], workers: Workers, lost: dict[int, End | None], *, has_stepped: bool
    ) -> ExitReport | None:
        """Decide whether the script has ended by itself, and whether it would do so again."""
        culprit, end = next(iter(lost.items()))
        failure = failure_of(self._folder, workers.pids()[culprit]) or Failure("")
        stages = workers.stages.values()
        self._program_starts = replace(
            self._program_starts,
            came_to_fit=self._program_starts.came_to_fit or any(stage is not Stage.BEFORE for stage in stages),
        )
        found = ProgramEnd(
            None if end is None else end.exit_code,
            workers.stages[culprit],
            failure.error,
            failure.is_of_lost_peer,
            signal_name="" if end is None else split_exit(end.exit_code)[1] or "",
            rank=ranks[culprit],
            step=step_begun(self._folder, culprit),
            out_of_memory="" if workers.hang_reason(culprit) else self._out_of_memory,
        )
        plan = judge_end(found, self._program_starts, has_stepped=has_stepped)
        self._program_starts = plan.starts
        if plan.final is not None:
            return ExitReport(ranks[culprit], final=True, reason=plan.final, keeps_state=plan.keeps_state)
        if found.is_its_own and found.stage is Stage.BEFORE and plan.starts.came_to_fit:
            self._in_place.disable(
                f"a new process ended before fit ({found}), which the first ones reached: what the script does before "
                "fit cannot be repeated by one process alone"
            )
        return None

    def _record_fault(self, fault: FaultReport) -> None:
        self.faults.append(fault)
        self._unresolved.append(fault)
        self._record("fault", node=self._node.name, **fault.fields())
        if full := self._log_files.why_full():
            CONSOLE.say(full)

    def _current_workers(self) -> Workers:
        assert isinstance(self._pcontext, Workers)
        return self._pcontext

    # ---------------------------------------------------------------- stopping workers

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        workers = self._current_workers()
        self._in_place.end_round()
        if workers.running:
            # No worker failed: nodes have joined or left. The state is in the arenas, so there is nothing to wait for.
            at = time.time()
            workers.stop(signal.SIGKILL, 0)
            size = worker_group.workers[0].world_size
            lost_at, stopped_at = self._lost_at or at, time.time()
            self._record_fault(FaultReport(None, None, None, None, lost_at, at, stopped_at, len(self.faults) + 1, size))
            self._reason = "nodes have joined or left"
        super()._stop_workers(worker_group)

    def _shutdown(self, *_: Any, **__: Any) -> None:
        """Stop running workers, whatever signal ended the agent, and kill them after our own grace time."""
        self._in_place.end_round()
        request = sys.exception()
        if isinstance(request, RendezvousError | DistError) and self._pcontext is not None:
            # The other nodes will meet elsewhere, and the state is in the arenas.
            self._current_workers().stop(signal.SIGKILL, 0)
        grace_s = END_GRACE_S if request is None else 0.0
        if isinstance(request, AskedToEnd) and request.number == signal.SIGTERM and self._pcontext is not None:
            grace_s = self._current_workers().finish(self._node.finish_grace_s)
        if self._pcontext is not None:
            # Not by torch's own shutdown, which takes no time-out before torch 2.12.
            self._pcontext.close(signal.SIGTERM, self._node.stop_grace_s)  # type: ignore[arg-type]
        super()._shutdown(signal.SIGTERM)
        self._sidecars.end(grace_s)
