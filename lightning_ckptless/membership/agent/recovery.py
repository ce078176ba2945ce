"""Recovery from the loss of workers on one node: in place, by a relaunch of all workers, or not at all.

`protocol/recovery.py` decides; this module collects what it needs and carries out the decision.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Protocol

from lightning_ckptless.errors import UnfitNodeError
from lightning_ckptless.membership.agent.draining import Draining
from lightning_ckptless.membership.agent.fault_log import FaultLog
from lightning_ckptless.membership.agent.in_place import InPlaceRecovery, WorkerControl
from lightning_ckptless.membership.agent.settings import NodeRun, NodeSettings
from lightning_ckptless.membership.channel.exit_report import ExitReport
from lightning_ckptless.membership.channel.fault_report import FaultReport, shell_code, split_exit
from lightning_ckptless.membership.channel.program_failure import Failure
from lightning_ckptless.membership.channel.worker_reports import WorkerReports
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.drain_events import Drained
from lightning_ckptless.membership.events import RecoveredInPlace, Report, RunEnded
from lightning_ckptless.membership.forkserver.client import End
from lightning_ckptless.membership.rendezvous.rounds import Round
from lightning_ckptless.protocol.crash_loop import ProgramEnd, Stage, Starts, judge_end
from lightning_ckptless.protocol.messages import HandedOver, Message, RunOver
from lightning_ckptless.protocol.recovery import RecoveryPlan, Rung, Situation, plan_recovery
from lightning_ckptless.protocol.retry_policy import why_no_recovery

Lost = Mapping[int, End | None]
"""Lost workers by local rank, in the order of their deaths; None if the exit is not known."""


class LosableWorkers(WorkerControl, Protocol):
    """What a recovery of any kind needs of this node's workers; see `WorkerGroup`."""

    inside: set[int]
    stages: dict[int, Stage]
    handed_over: dict[int, HandedOver]
    gave_up: set[int]

    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""

    def hang_reason(self, rank: int) -> str:
        """Why a worker was killed as hung; empty if it was not."""

    def failed(self) -> Mapping[int, End]:
        """Workers whose exit is known to be their own failure."""

    def send(self, message: Message) -> None:
        """Send a message to all workers that run."""

    def stop(self, death_signal: int, grace_s: float) -> None:
        """Stop all workers that still run, and wait until they have exited."""


class Recovery:
    """Recovers one node from the loss of its workers.

    Args:
        settings: the node's settings.
        run: the run on this node.
        in_place: the recoveries in place.
        draining: receives which ranks were handed over.
        faults: the faults of this node.
        reports: reports that its workers have left.
        oom_kills: describes the kills for lack of memory since the last call; empty for none.
        report: receives events.
        clock: this node's clock.

    Attributes:
        reason: why all workers were last stopped, in a sentence.
    """

    def __init__(
        self,
        settings: NodeSettings,
        run: NodeRun,
        in_place: InPlaceRecovery,
        draining: Draining,
        faults: FaultLog,
        reports: WorkerReports,
        oom_kills: Callable[[], str],
        report: Report,
        clock: Clock,
    ) -> None:
        self.reason = ""
        self._settings = settings
        self._run = run
        self._in_place = in_place
        self._draining = draining
        self._faults = faults
        self._reports = reports
        self._oom_kills = oom_kills
        self._report = report
        self._clock = clock
        self._starts = Starts()
        self._out_of_memory = ""

    def take_progress(self) -> bool:
        """Whether a new step has been committed since the last call."""
        has_stepped = self._reports.take_begun()
        if has_stepped:
            self._run.history = self._run.history.after_progress()
            self._faults.resolve()
        return has_stepped

    def begin_round(self, local_ranks: Collection[int]) -> None:
        """Discard what the workers of the previous round have left."""
        self._reports.take_final()
        self.take_progress()
        for local_rank in local_ranks:
            self._reports.forget_progress(local_rank)

    def recover(
        self,
        rendezvous: Round,
        workers: LosableWorkers,
        lost: Lost,
        env_of: Callable[[int], dict[str, str]],
        obstacle_elsewhere: Callable[[], str],
    ) -> Rung:
        """Decide how to recover from the loss of workers, and do so.

        Args:
            rendezvous: the round.
            workers: this node's workers.
            lost: those that are lost; not empty.
            env_of: environment variables that make a process a local rank.
            obstacle_elsewhere: why the workers of the other nodes cannot regroup; called if those of this node can.

        Raises:
            UnfitNodeError: this node cannot continue; its workers are stopped.
        """
        at, ranks = self._clock.wall(), rendezvous.ranks
        has_stepped = self.take_progress()
        self._out_of_memory = self._oom_kills()
        # Handed-over workers come last: any other one is the culprit.
        lost = dict(sorted(lost.items(), key=lambda item: item[0] in workers.handed_over))
        is_planned = next(iter(lost)) in workers.handed_over
        exit_report = self._reports.take_final()
        if exit_report is None and not is_planned:
            exit_report = self._judge_end(ranks, workers, lost, has_stepped=has_stepped)
        if exit_report is not None and exit_report.unfit:
            workers.stop(signal.SIGKILL, 0.0)
            raise UnfitNodeError(exit_report.reason)
        now = self._clock.monotonic()
        plan = self._plan(rendezvous, workers, lost, exit_report, now, is_planned=is_planned)
        if plan.rung is Rung.IN_PLACE and (obstacle := obstacle_elsewhere()):
            plan = RecoveryPlan(Rung.RELAUNCH, f"not in place: {obstacle}")
        if plan.rung is not Rung.END and not is_planned:
            self._run.history = self._run.history.after_recovery(now)
        if plan.rung is Rung.IN_PLACE:
            self._replace(rendezvous, workers, lost, at, plan, env_of)
        else:
            self._stop_survivors(rendezvous, workers, lost, at, plan, exit_report)
        return plan.rung

    def _plan(
        self,
        rendezvous: Round,
        workers: LosableWorkers,
        lost: Lost,
        exit_report: ExitReport | None,
        now: float,
        *,
        is_planned: bool,
    ) -> RecoveryPlan:
        ranks = rendezvous.ranks
        limits = self._settings.limits(self._in_place.limits)
        return plan_recovery(
            Situation(
                lost=tuple(ranks[local_rank] for local_rank in lost),
                world_size=rendezvous.world_size,
                final=None if exit_report is None else exit_report.reason,
                exhausted=None if is_planned else why_no_recovery(self._run.history, limits, now),
                in_place=self._in_place.is_wanted,
                obstacle=self._in_place.obstacle,
                outside={ranks[rank]: workers.stages[rank] for rank in ranks if rank not in workers.inside},
                tries=self._in_place.tries,
                handed_over=is_planned,
            )
        )

    def _replace(
        self,
        rendezvous: Round,
        workers: LosableWorkers,
        lost: Lost,
        at: float,
        plan: RecoveryPlan,
        env_of: Callable[[int], dict[str, str]],
    ) -> None:
        """Replace the lost ranks while the survivors stay in the training loop."""
        self._run.recoveries_in_place += 1
        fault = self._fault_of(rendezvous, workers, lost, at)
        handed_over = {rank: workers.handed_over[rank] for rank in lost if rank in workers.handed_over}
        before = workers.pids()
        regrouping = self._in_place.open(fault)
        for local_rank in lost:
            self._reports.forget_progress(local_rank)
        kinds = self._in_place.replace(workers, list(lost), regrouping, env_of)
        if not fault.drained:
            self._faults.add(fault)
        pids = workers.pids()
        new = {rendezvous.ranks[rank]: (pids[rank], kind) for rank, kind in kinds.items()}
        self._report(RecoveredInPlace(self._settings.name, regrouping.number, plan.reason, fault, new))
        for local_rank, message in handed_over.items():
            rank, end, pid = rendezvous.ranks[local_rank], lost[local_rank], before[local_rank]
            code = None if end is None else end.exit_code
            done = Drained(self._settings.name, rank, message.step, message.reason, pid, code, *new[rank])
            self._draining.note(local_rank, done)

    def _fault_of(self, rendezvous: Round, workers: LosableWorkers, lost: Lost, detected_at: float) -> FaultReport:
        culprit, end = next(iter(lost.items()))
        handed_over = workers.handed_over.get(culprit)
        return self._faults.of_worker(
            rendezvous.ranks[culprit],
            workers.pids()[culprit],
            end,
            detected_at=detected_at,
            world_size=rendezvous.world_size,
            hung=workers.hang_reason(culprit),
            out_of_memory=self._out_of_memory,
            drained="" if handed_over is None else handed_over.reason,
        )

    def _stop_survivors(
        self,
        rendezvous: Round,
        workers: LosableWorkers,
        lost: Lost,
        at: float,
        plan: RecoveryPlan,
        exit_report: ExitReport | None,
    ) -> None:
        """Stop all workers in the way that the next action needs, and record what happened."""
        relaunches, run = plan.rung is Rung.RELAUNCH, self._run
        if not relaunches:
            run.has_given_up = exit_report is None or exit_report.keeps_state
            workers.send(RunOver())
        grace_s = 0.0 if relaunches else self._settings.stop_grace_s
        workers.stop(signal.SIGKILL if relaunches else signal.SIGTERM, grace_s)
        failed = workers.failed()
        lost = {rank: failed.get(rank, end) for rank, end in lost.items()}
        of_report = None if exit_report is None else exit_report.rank
        reported = [end for rank, end in lost.items() if rendezvous.ranks[rank] == of_report]
        end = (reported or list(lost.values()))[0]
        run.exit_code = shell_code(-signal.SIGKILL if end is None else end.exit_code) or 1
        culprit = next(iter(lost))
        if workers.hang_reason(culprit) and self._reports.failure_of(workers.pids()[culprit]) is not None:
            # Its script had failed before it was killed for not exiting.
            run.exit_code = 1
        fault = self._fault_of(rendezvous, workers, lost, at)
        self._faults.add(fault)
        self.reason = plan.reason
        if not relaunches:
            self._report(RunEnded(fault, plan.reason))

    def _judge_end(
        self, ranks: Mapping[int, int], workers: LosableWorkers, lost: Lost, *, has_stepped: bool
    ) -> ExitReport | None:
        """Decide whether the script ended by itself, and whether it would do so again."""
        culprit, end = next(iter(lost.items()))
        if culprit in workers.gave_up:
            # It has exited because of an earlier fault, which says nothing about the script.
            return None
        failure = self._reports.failure_of(workers.pids()[culprit]) or Failure("")
        stages = workers.stages.values()
        came_to_fit = self._starts.came_to_fit or any(stage is not Stage.BEFORE for stage in stages)
        found = ProgramEnd(
            None if end is None else end.exit_code,
            workers.stages[culprit],
            failure.error,
            failure.is_of_lost_peer,
            signal_name="" if end is None else split_exit(end.exit_code)[1] or "",
            rank=ranks[culprit],
            step=self._reports.step_begun(culprit),
            out_of_memory="" if workers.hang_reason(culprit) else self._out_of_memory,
        )
        plan = judge_end(found, replace(self._starts, came_to_fit=came_to_fit), has_stepped=has_stepped)
        self._starts = plan.starts
        if plan.final is not None:
            return ExitReport(ranks[culprit], final=True, reason=plan.final, keeps_state=plan.keeps_state)
        if found.is_its_own and found.stage is Stage.BEFORE and plan.starts.came_to_fit:
            self._in_place.disable(
                f"a new process ended before fit ({found}), which the first ones reached: what the script does before "
                "fit cannot be repeated by one process alone"
            )
        return None
