"""RecoveryLoop: runs the fit loop so that the loss of a peer rolls this rank back instead of ending it.

A survivor stays inside `fit`. The error that a fault causes, directly or because the agent aborts this rank's
connections, is caught where the fit loop was entered. The rank joins the others in a new rendezvous, is rolled back to
the newest complete version, and resumes in the middle of the epoch with the same trainer, model, optimizers,
dataloaders and loggers. No hook of a starting or failing `fit` is called. A replacement reaches the same point through
a regular `fit`, and follows the same path from there on.

    OUTSIDE -> TRAINING -> ABORTED -> REGROUPING -> RESTORING -> TRAINING     (the table is in `protocol.recovery`)

Any error on the way counts as another fault and restarts the procedure. Where recovery is impossible, this process
reports the reason to its agent and exits, and the agent takes the next rung of the ladder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from lightning_ckptless import environment
from lightning_ckptless.errors import CkptlessError, TransportError, UnevenStepsError, let_go
from lightning_ckptless.internals.lightning.launch import is_stop
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.worker.peer_errors import is_lost_peer
from lightning_ckptless.membership.worker.placeholder_group import require_no_refusals
from lightning_ckptless.membership.worker.watcher import Assignment, Watcher
from lightning_ckptless.protocol.messages import CannotRecover, LeftLoop, WaitingAtLoop
from lightning_ckptless.protocol.recovery import WorkerEvent, WorkerState, next_state
from lightning_ckptless.protocol.rewind import RewindPlan
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.recovery.announcements import announce_entry, announce_imports, arrival
from lightning_ckptless.trainer.recovery.fit_resume import continue_fit, run_restored
from lightning_ckptless.trainer.recovery.own_process import THIS_PROCESS, CannotRecoverInPlaceError, OwnProcess
from lightning_ckptless.trainer.recovery.regrouping import Regrouping
from lightning_ckptless.trainer.reporting.step_progress import StepProgress
from lightning_ckptless.trainer.rewind.rewind_procedure import RewindProcedure
from lightning_ckptless.trainer.rewind.rewinding import GoBackError
from lightning_ckptless.trainer.session.session import Session

log = logging.getLogger(__name__)

LOST_PEER_WAIT_S = 30.0
"""Seconds to wait for the agent's decision after an error that indicates a lost peer."""
ANY_ERROR_WAIT_S = 0.5
"""Seconds to wait for the agent's decision after any other error, which a lost peer may have caused as well."""


class RecoveryLoop:
    """Runs the fit loop of one trainer through the faults of its peers.

    Args:
        strategy: strategy of the trainer.
        session: session of this rank.
        loops: loops of the trainer.
        progress: reports this rank's position in the step.
        regrouping: joins the other ranks and restores a version.
        rewind: carries out rewinds.
        watcher: listens to our agent; None under an external agent, or with a single rank.
        process: this process.
    """

    def __init__(
        self,
        strategy: Any,
        session: Session,
        loops: FitLoops,
        progress: StepProgress,
        regrouping: Regrouping,
        rewind: RewindProcedure,
        watcher: Watcher | None,
        process: OwnProcess = THIS_PROCESS,
    ) -> None:
        self.state = WorkerState.OUTSIDE
        self._strategy = strategy
        self._session = session
        self._loops = loops
        self._progress = progress
        self._regrouping = regrouping
        self._rewind = rewind
        self._watcher = watcher
        self._process = process
        self._has_trained = False

    # ------------------------------------------------------------------ entering

    def run(self, first: Callable[[], None]) -> None:
        """Run the fit loop among ranks that have all been started together.

        Args:
            first: runs the loop, from its beginning or from a restored position.
        """
        self._move(WorkerEvent.ENTER)
        if self._watcher is not None:
            announce_entry(self._watcher, self._session.options, self._strategy)
            announce_imports(self._watcher, self._session.options)
        self._has_trained = True
        self._run(first)

    def join_and_run(self) -> None:
        """Run the fit loop as the replacement of a lost rank."""
        self._run(lambda: run_restored(self._loops, self._join))

    def _join(self, start_hooks: Callable[[], None]) -> Version:
        # In this process alone, without a process group: the survivors do not repeat them.
        start_hooks()
        # Cleared for good: after this `fit` the process is a regular member.
        require_no_refusals()
        self._regrouping.report_arrival(arrival(self._process.env, self._process.clock.wall()))
        env = self._process.env
        number, report = env.pop(environment.REGROUPING), env[environment.FAULT_REPORT]
        self._process.show_output()
        if self._watcher is not None:
            announce_entry(self._watcher, self._session.options, self._strategy)
            self._watcher.send(WaitingAtLoop())
        fault = FaultReport.from_json(report)
        # The startup time of this process counts as regrouping, not as detection.
        return self._restore_among_others(Assignment(int(number), fault, fault.stopped_at))

    # ------------------------------------------------------------------ running

    def _run(self, enter: Callable[[], None]) -> None:
        while True:
            try:
                enter()
                break
            except GoBackError as decided:
                plan = decided.plan
                let_go(decided)
                enter = partial(self._go_back, plan)
                continue
            except Exception as error:
                assignment = self._peer_fault(error)
                if assignment is None and (isinstance(error, UnevenStepsError) or not self._failure):
                    raise
                let_go(error)
            if assignment is None:
                # Outside the except block: the error above only says that a peer was lost, which is not the cause.
                raise UnevenStepsError(self._failure)
            enter = self._recover(assignment)
        self._move(WorkerEvent.LEAVE)
        self._progress.leave_loop()
        if self._watcher is not None:
            self._watcher.send(LeftLoop())

    def _go_back(self, plan: RewindPlan) -> None:
        """Roll back to an earlier version together with all other ranks, and run the rest of the loop."""
        self._loops.tidy_up()
        version = self._rewind.carry_out(plan)
        continue_fit(self._loops, validation_done=version.validation_done)

    def ask_to_leave(self) -> None:
        """Called after the last epoch: proceed to the end of `fit`, or to the next generation.

        Raises:
            TransportError: a new generation is forming.
            UnevenStepsError: another rank has begun a further step.
            GoBackError: all ranks go back to an earlier version.
        """
        self._rewind.stop_if_due()
        self._progress.leave_loop()
        may_leave = self._watcher is None or self._watcher.ask_to_leave(self._loops.at_end)
        if self._failure:
            raise UnevenStepsError(self._failure)
        if not may_leave:
            raise TransportError(
                f"rank {self._session.rank} was asked to join a new generation while it was leaving the training loop"
            )
        # From here on only a relaunch can roll a rank back.
        self._session.loggers.flush()
        self._session.leave_loop()

    @property
    def _failure(self) -> str:
        """Why training cannot continue, as found by the agent; empty if it can."""
        return "" if self._watcher is None else self._watcher.failure

    def _peer_fault(self, error: Exception) -> Assignment | None:
        """The agent's assignment after an error; None if the error is this rank's own."""
        if self._watcher is None or self.state is not WorkerState.TRAINING or is_stop(error):
            return None
        if isinstance(error, CkptlessError) and not isinstance(error, TransportError):
            return None
        log.debug("rank %d: asking the agent about %r", self._session.rank, error)
        return self._watcher.accept(LOST_PEER_WAIT_S if is_lost_peer(error) else ANY_ERROR_WAIT_S)

    def _recover(self, assignment: Assignment) -> Callable[[], None]:
        """Regroup with the other ranks and roll back; returns a function that runs the rest of the loop."""
        self._move(WorkerEvent.FAULT)
        self._loops.tidy_up()
        version = self._restore_among_others(assignment)
        return lambda: continue_fit(self._loops, validation_done=version.validation_done)

    def _restore_among_others(self, assignment: Assignment) -> Version:
        """Regroup with the other ranks and restore a version, retrying after each further fault."""
        while True:
            self._move(WorkerEvent.ASSIGN)
            try:
                return self._restore_once(assignment)
            except CannotRecoverInPlaceError as error:
                self._give_up(str(error))
            except Exception as error:
                if not is_lost_peer(error):
                    raise
                newer = self._watcher.accept(LOST_PEER_WAIT_S) if self._watcher is not None else None
                if newer is None:
                    self._give_up(
                        f"{type(error).__name__} while regrouping, and no decision from the agent within "
                        f"{LOST_PEER_WAIT_S:.0f} s: {error}"
                    )
                let_go(error)
            assignment = newer
            self._move(WorkerEvent.FAULT)

    def _restore_once(self, assignment: Assignment) -> Version:
        ranks = self._regrouping.regroup(assignment)
        self._move(WorkerEvent.JOIN)
        version = self._regrouping.restore(assignment, ranks, survivor=self._has_trained)
        self._has_trained = True
        self._move(WorkerEvent.RESTORE)
        return version

    def _give_up(self, reason: str) -> NoReturn:
        """Report the reason and end this process, so that the agent takes the next rung."""
        self._move(WorkerEvent.GIVE_UP)
        if self._watcher is not None:
            self._watcher.send(CannotRecover(reason, lasting=False))
        self._process.leave()

    def _move(self, event: WorkerEvent) -> None:
        self.state = next_state(self.state, event)
