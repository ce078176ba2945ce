"""RecoveryLoop: runs the fit loop so that the loss of a peer rolls this rank back instead of ending it.

A survivor stays inside `fit`. The error that a fault causes, directly or because the agent aborts this rank's
connections, is caught where the fit loop was entered. The rank meets the others in a new rendezvous, is rolled back to
the newest complete version, and resumes in the middle of the epoch with the same trainer, model, optimizers,
dataloaders and loggers. No hook of a starting or failing `fit` is called. A replacement reaches the same point through
a regular `fit`, and follows the same path from there on.

    OUTSIDE -> TRAINING -> CUT -> REGROUPING -> RESTORING -> TRAINING     (the table is in `protocol.recovery`)

Any error on the way counts as another fault and restarts the procedure. Where recovery is impossible, this process
reports the reason to its agent and exits, and the agent takes the next rung of the ladder.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, NoReturn

from lightning_ckptless import environment
from lightning_ckptless.console import CONSOLE
from lightning_ckptless.errors import CkptlessError, TransportError, UnevenStepsError, let_go
from lightning_ckptless.internals.lightning import progress_bar
from lightning_ckptless.internals.lightning.launch import is_stop
from lightning_ckptless.membership.channel.fault_report import FaultReport
from lightning_ckptless.membership.forkserver.imported import take_imported
from lightning_ckptless.membership.worker import hidden_output
from lightning_ckptless.membership.worker.peer_errors import is_lost_peer
from lightning_ckptless.membership.worker.placeholder_group import require_no_refusals
from lightning_ckptless.membership.worker.watcher import Assignment, Watcher
from lightning_ckptless.protocol.messages import (
    CannotRecover,
    CreatedGroup,
    EnteredLoop,
    LeftLoop,
    ProgramImported,
    Regrouped,
    WaitingAtLoop,
)
from lightning_ckptless.protocol.newcomer import Arrival, Imports
from lightning_ckptless.protocol.recovery import WorkerEvent, WorkerState, next_state
from lightning_ckptless.protocol.versions import Complete, Version
from lightning_ckptless.replica.restore import choose
from lightning_ckptless.replica.transport import gather_json
from lightning_ckptless.trainer.commit.mirroring import Mirroring
from lightning_ckptless.trainer.commit.step_boundaries import StepBoundaries
from lightning_ckptless.trainer.data.batch_log import BatchLog
from lightning_ckptless.trainer.recovery.exits import leave_process
from lightning_ckptless.trainer.recovery.fit_resume import continue_fit, run_joined
from lightning_ckptless.trainer.recovery.restoration import Restoration
from lightning_ckptless.trainer.session.engine import Engine
from lightning_ckptless.trainer.session.member_set import form_member_set

log = logging.getLogger(__name__)

LOST_PEER_WAIT_S = 30.0
"""Seconds to wait for the agent's decision after an error that indicates a lost peer."""
ANY_ERROR_WAIT_S = 0.5
"""Seconds to wait for the agent's decision after any other error, which a lost peer may have caused as well."""


class RecoveryLoop:
    """Runs the fit loop of one trainer through the faults of its peers.

    Args:
        engine: engine of the trainer.
        mirroring: captures the trainer's versions.
        batches: batches in flight.
        boundaries: the points at which versions are captured.
    """

    def __init__(self, engine: Engine, mirroring: Mirroring, batches: BatchLog, boundaries: StepBoundaries) -> None:
        self.state = WorkerState.OUTSIDE
        self._engine = engine
        self._strategy = engine.strategy
        self._trainer = engine.trainer
        self._loops = engine.loops
        self._mirroring = mirroring
        self._batches = batches
        self._boundaries = boundaries
        self._has_trained = False
        self._arrival: Arrival | None = None

    @property
    def _watcher(self) -> Watcher | None:
        watcher: Watcher | None = self._strategy.watcher
        return watcher

    # ------------------------------------------------------------------ entering

    def run(self, first: Callable[[], None]) -> None:
        """Run the fit loop among ranks that have all been started together.

        Args:
            first: runs the loop, from its beginning or from a restored position.
        """
        self._move(WorkerEvent.ENTER)
        self._say_entered()
        self._say_imported()
        self._has_trained = True
        self._run(first)

    def join_and_run(self) -> None:
        """Run the fit loop as the replacement of a lost rank."""
        self._run(lambda: run_joined(self._loops, self._join))

    def _join(self) -> bool:
        # Cleared for good: after this `fit` the process is a regular member.
        require_no_refusals()
        self._arrival = self._arrive()
        number, report = os.environ.pop(environment.REGROUPING), os.environ[environment.FAULT_REPORT]
        hidden_output.show()
        self._say_entered()
        if self._watcher is not None:
            self._watcher.send(WaitingAtLoop())
        fault = FaultReport.from_json(report)
        # The startup time of this process counts as regrouping, not as detection.
        return self._restore_among_others(Assignment(int(number), fault, fault.stopped_at)).validation_done

    @staticmethod
    def _arrive() -> Arrival:
        imported = take_imported()
        spawned_at = float(os.environ.get(environment.SPAWNED_AT) or time.time())
        modules = 0 if imported is None else len(imported.modules)
        return Arrival(time.time() - spawned_at, modules, Imports(os.environ.get(environment.IMPORTS, Imports.OFF)))

    def _take_arrival(self) -> tuple[Any, ...] | None:
        """Startup figures of this process, for the first recovery that it takes part in."""
        arrival, self._arrival = self._arrival, None
        return None if arrival is None else astuple(arrival)

    def _say_entered(self) -> None:
        if self._watcher is not None:
            options = self._engine.options
            entered = EnteredLoop(
                in_place=bool(options.in_place),
                standbys=options.standbys,
                preload_imports=bool(options.preload_imports),
                hang_timeout_s=None if options.hang_timeout_s is None else float(options.hang_timeout_s),
                max_recoveries_without_progress=options.max_recoveries_without_progress,
                max_recoveries_per_hour=options.max_recoveries_per_hour,
                obstacle=self._obstacle(),
                bar=str(CONSOLE.bar),
                fixed_world=self._strategy.obstacle_to_another_world(),
            )
            self._watcher.send(entered)

    def _say_imported(self) -> None:
        """Report to the agent what to import for new processes; one worker per node does so."""
        if (
            self._watcher is None
            or os.environ.get("LOCAL_RANK", "0") != "0"
            or not self._engine.options.preload_imports
        ):
            return
        if (imported := take_imported()) is not None:
            self._watcher.send(ProgramImported(imported.modules, imported.variables, imported.path))

    def _obstacle(self) -> str | None:
        """Why no new process could reach this point; None if one can."""
        if obstacle := self._strategy.obstacle_of_calls:
            return str(obstacle)
        if obstacle := self._strategy.obstacle_in_place():
            return str(obstacle)
        if foreign := self._strategy.world.foreign_groups():
            return f"the script has created {foreign} process groups of its own, which no new process could re-create"
        return None

    # ------------------------------------------------------------------ running

    def _run(self, enter: Callable[[], None]) -> None:
        while True:
            try:
                enter()
                break
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
        self._engine.leave_loop()
        if self._watcher is not None:
            self._watcher.send(LeftLoop())

    def ask_to_leave(self) -> None:
        """Called after the last epoch: proceed to the end of `fit`, or meet the ranks of the next generation.

        Raises:
            TransportError: a new generation is forming.
            UnevenStepsError: another rank has begun a further step.
        """
        self._engine.leave_loop()
        may_leave = self._watcher is None or self._watcher.ask_to_leave(self._loops.at_end)
        if self._failure:
            raise UnevenStepsError(self._failure)
        if not may_leave:
            raise TransportError(
                f"rank {self._engine.rank} was asked to join a new generation while it was leaving the training loop"
            )
        # From here on only a relaunch can roll a rank back.
        self._engine.loggers.flush()
        self._engine.report.out_of_steps()

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
        log.debug("rank %d: asking the agent about %r", self._engine.rank, error)
        return self._watcher.accept(LOST_PEER_WAIT_S if is_lost_peer(error) else ANY_ERROR_WAIT_S)

    def _recover(self, assignment: Assignment) -> Callable[[], None]:
        """Meet the other ranks and roll back; returns a function that runs the rest of the loop."""
        self._move(WorkerEvent.FAULT)
        self._loops.tidy_up()
        version = self._restore_among_others(assignment)
        return lambda: continue_fit(self._loops, validation_done=version.validation_done)

    def _restore_among_others(self, assignment: Assignment) -> Version:
        """Meet the other ranks and restore a version, retrying after each further fault."""
        while True:
            self._move(WorkerEvent.ASSIGN)
            try:
                return self._restore_once(assignment)
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
        engine, report = self._engine, self._engine.report
        report.faulted(assignment)
        engine.interrupt()
        engine.adopt_rank(assignment.env)
        self._mirroring.abandon()
        if foreign := self._strategy.world.foreign_groups():
            self._give_up(f"the script has created {foreign} process groups of its own, which cannot be re-created")
        engine.probe_recovery("regroup")
        self._strategy.world.leave()
        if self._watcher is not None:
            self._watcher.release()
        self._strategy.rejoin(
            assignment.number,
            lambda: self._watcher is not None and self._watcher.is_over,
            lambda: engine.probe_recovery("meet"),
        )
        assert engine.arena is not None
        self._report_group(assignment, 1)
        transport = engine.connect()
        self._report_group(assignment, 2)
        facts: list[Any] = [engine.identity.node, engine.has_moved, self._take_arrival()]
        nodes, has_moved, arrivals = zip(*gather_json(transport, facts), strict=True)
        generation, mesh = self._strategy.world.generation, self._strategy.mesh_sizes()
        engine.members = form_member_set(
            transport, engine.arena, nodes, engine.options, generation, record=engine.generation_record, mesh=mesh
        )
        self._strategy.world.renumber(engine.members.generation)
        engine.loggers.identify_as_noted(engine.members)
        self._move(WorkerEvent.MEET)
        engine.restoring()
        if self._watcher is not None:
            self._watcher.send(Regrouped(assignment.number))
        engine.durable.assign_writer(engine.members)
        report.met(engine.members.generation, [Arrival(*arrival) for arrival in arrivals if arrival is not None])
        found = choose(engine.arena, transport, nodes)
        if not isinstance(found, Complete):
            self._give_up(found.reason)
        engine.restoring()
        restoration = engine.fetch(found)
        engine.restoring()
        self._mirroring.join(engine.members)
        engine.probe_recovery("restore")
        self._put_back(restoration, moved=any(has_moved))
        self._move(WorkerEvent.RESTORE)
        return restoration.version

    def _report_group(self, assignment: Assignment, created: int) -> None:
        """Tell the agent how many groups this rank has created, so that it can name a rank that the others wait for."""
        if self._watcher is not None:
            self._watcher.send(CreatedGroup(assignment.number, created))

    def _put_back(self, restoration: Restoration, *, moved: bool) -> None:
        """Put a version into this rank's trainer, dataloaders and loggers.

        Args:
            restoration: the version.
            moved: whether any process has changed its rank.
        """
        assert self._engine.members is not None
        mirroring, version = self._mirroring, restoration.version
        # After a change of ranks the local optimizer state belongs to the previous rank.
        optimizers_hold = mirroring.optimizers_hold(version) and not moved
        restoration.make_data(self._engine.data_hooks, self._strategy.alone)
        restoration.fill(self._trainer, optimizers_hold=optimizers_hold, index=mirroring.index_of(restoration.layout))
        self._mirroring.host_state.apply(restoration.state)
        self._engine.check_files(restoration)
        self._engine.loggers.restore(restoration.host_state["logs"])
        virtual_ranks = self._engine.virtual_ranks
        if moved:
            self._engine.reopen_data()
        elif virtual_ranks.opened_for != virtual_ranks.count:
            self._engine.reopen_training_data()
        restoration.open_virtual_ranks(virtual_ranks)
        if moved or not self._batches.go_back_to(restoration.version):
            self._loops.set_sampler_epochs()
            restoration.move_data(self._loops)
            self._batches.reset()
        restoration.move_virtual_ranks(virtual_ranks)
        self._boundaries.last = restoration.version
        progress_bar.show_position(self._trainer, afresh=not self._has_trained)
        self._has_trained = True
        restoration.resume(self._mirroring, self._engine.report, self._engine.members)

    def _give_up(self, reason: str) -> NoReturn:
        """Report the reason and end this process, so that the agent takes the next rung."""
        self._move(WorkerEvent.GIVE_UP)
        if self._watcher is not None:
            self._watcher.send(CannotRecover(reason, lasting=False))
        leave_process()

    def _move(self, event: WorkerEvent) -> None:
        self.state = next_state(self.state, event)


def run_through_faults(engine: Engine, batches: BatchLog) -> None:
    """Let a recovery loop run the fit loop of an engine's trainer.

    Args:
        engine: engine that is attached to its trainer.
        batches: batches in flight.
    """
    assert engine.mirroring is not None and engine.boundaries is not None, "the engine is attached"
    loop = RecoveryLoop(engine, engine.mirroring, batches, engine.boundaries)
    engine.loops.before_end_of_run(loop.ask_to_leave)
    if engine.members is None:
        engine.loops.run_by(lambda _: loop.join_and_run())
    else:
        engine.loops.run_by(lambda run: loop.run(engine.entered_by(run)))
