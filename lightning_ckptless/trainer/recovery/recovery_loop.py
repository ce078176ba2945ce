"""RecoveryLoop: the fit loop, run so that the loss of a peer rolls this rank back instead of ending it.

A rank that lives through a fault stays inside `fit`. The error that it meets, or is given by having its connections
cut, is caught where the fit loop was entered. The rank meets the others anew, is rolled back to the newest complete
version, and goes on in the middle of the epoch: the same trainer, model, optimizers, dataloaders and loggers, and no
hook of a starting or failing `fit` is called. A new process that takes a lost rank's place comes to the same point from
the other side, through `fit` as always, and from there on does the same.

    OUTSIDE -> TRAINING -> CUT -> REGROUPING -> RESTORING -> TRAINING     (the table is in `protocol.recovery`)

Whatever goes wrong on the way is another fault, and begins the way again. Where the way cannot be gone, the agent is
told why, this process ends, and the next rung of the ladder is its agent's.
"""

from __future__ import annotations

import json
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
from lightning_ckptless.trainer.commit.mirroring import Mirroring
from lightning_ckptless.trainer.commit.step_boundaries import StepBoundaries
from lightning_ckptless.trainer.data.batch_log import BatchLog
from lightning_ckptless.trainer.recovery.exits import leave_process
from lightning_ckptless.trainer.recovery.fit_resume import go_on, run_joined
from lightning_ckptless.trainer.recovery.restoration import Restoration
from lightning_ckptless.trainer.session.engine import Engine
from lightning_ckptless.trainer.session.member_set import form_member_set

log = logging.getLogger(__name__)

LOST_PEER_WAIT_S = 30.0
"""For the agent's word after an error that says that a peer is gone."""
ANY_ERROR_WAIT_S = 0.5
"""For the agent's word after any other error, which may come of a lost peer too."""


class RecoveryLoop:
    """Runs the fit loop of one trainer through the faults of its peers.

    Args:
        engine: of the trainer.
        mirroring: takes its versions.
        batches: those in hand.
        boundaries: where versions are taken.
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
        """Run the fit loop in the place of a lost rank."""
        self._run(lambda: run_joined(self._loops, self._join))

    def _join(self) -> bool:
        # Once: what this process does after this fit it does among the others.
        require_no_refusals()
        self._arrival = self._arrive()
        number, report = os.environ.pop(environment.REGROUPING), os.environ[environment.FAULT_REPORT]
        hidden_output.show()
        self._say_entered()
        if self._watcher is not None:
            self._watcher.send(WaitingAtLoop())
        fault = FaultReport.from_json(report)
        # The way of this process to the others is part of their meeting, not of their being told.
        return self._restore_among_others(Assignment(int(number), fault, fault.stopped_at)).validation_done

    @staticmethod
    def _arrive() -> Arrival:
        imported = take_imported()
        spawned_at = float(os.environ.get(environment.SPAWNED_AT) or time.time())
        modules = 0 if imported is None else len(imported.modules)
        return Arrival(time.time() - spawned_at, modules, Imports(os.environ.get(environment.IMPORTS, Imports.OFF)))

    def _take_arrival(self) -> tuple[Any, ...] | None:
        """How this process came to the others, for the first recovery that it is part of."""
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
        """Let the agent know what to import for new processes; one worker of a node does so."""
        if (
            self._watcher is None
            or os.environ.get("LOCAL_RANK", "0") != "0"
            or not self._engine.options.preload_imports
        ):
            return
        if (imported := take_imported()) is not None:
            self._watcher.send(ProgramImported(imported.modules, imported.variables, imported.path))

    def _obstacle(self) -> str | None:
        """Why no new process could come to where this one is."""
        if obstacle := self._strategy.obstacle_of_calls:
            return str(obstacle)
        if obstacle := self._strategy.obstacle_in_place():
            return str(obstacle)
        if foreign := self._strategy.world.foreign_groups():
            return f"the program has made {foreign} process groups of its own, which nobody else can make anew"
        return None

    # ------------------------------------------------------------------ running

    def _run(self, go: Callable[[], None]) -> None:
        while True:
            try:
                go()
                break
            except Exception as error:
                assignment = self._peer_fault(error)
                if assignment is None and (isinstance(error, UnevenStepsError) or not self._failure):
                    raise
                let_go(error)
            if assignment is None:
                # Not beside the error above: that one says that a peer was lost, which is not the cause.
                raise UnevenStepsError(self._failure)
            go = self._come_back(assignment)
        self._move(WorkerEvent.LEAVE)
        self._engine.leave_loop()
        if self._watcher is not None:
            self._watcher.send(LeftLoop())

    def ask_to_leave(self) -> None:
        """Called when the last epoch is over: go on to the end of `fit`, or meet those that come.

        Raises:
            TransportError: others come.
            UnevenStepsError: another rank has begun a further step.
        """
        self._engine.leave_loop()
        may_leave = self._watcher is None or self._watcher.ask_to_leave(self._loops.at_end)
        if self._failure:
            raise UnevenStepsError(self._failure)
        if not may_leave:
            raise TransportError(f"rank {self._engine.rank} was told to meet others while it asked to leave the loop")
        # No rank goes back from here, but in a relaunch.
        self._engine.loggers.flush()
        self._engine.report.ran_out()

    @property
    def _failure(self) -> str:
        """Why training cannot continue, as the agent has found it; empty where it can."""
        return "" if self._watcher is None else self._watcher.failure

    def _peer_fault(self, error: Exception) -> Assignment | None:
        """What the agent says of an error; None where it is this rank's own."""
        if self._watcher is None or self.state is not WorkerState.TRAINING or is_stop(error):
            return None
        if isinstance(error, CkptlessError) and not isinstance(error, TransportError):
            return None
        log.debug("rank %d: asking the agent about %r", self._engine.rank, error)
        return self._watcher.accept(LOST_PEER_WAIT_S if is_lost_peer(error) else ANY_ERROR_WAIT_S)

    def _come_back(self, assignment: Assignment) -> Callable[[], None]:
        """Meet the others and be rolled back; returns what runs the rest of the loop."""
        self._move(WorkerEvent.FAULT)
        self._loops.tidy_up()
        version = self._restore_among_others(assignment)
        return lambda: go_on(self._loops, validation_done=version.validation_done)

    def _restore_among_others(self, assignment: Assignment) -> Version:
        """Meet the others and put everything back, over as many faults as come in between."""
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
                        f"{type(error).__name__} while meeting the others, and no word from the agent: {error}"
                    )
                let_go(error)
            assignment = newer
            self._move(WorkerEvent.FAULT)

    def _restore_once(self, assignment: Assignment) -> Version:
        engine, report = self._engine, self._engine.report
        report.faulted(assignment)
        engine.interrupt()
        engine.become(assignment.env)
        self._mirroring.abandon()
        if foreign := self._strategy.world.foreign_groups():
            self._give_up(f"the program has made {foreign} process groups of its own, which cannot be made anew")
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
        transport = engine.connect()
        facts = [engine.identity.node, engine.has_moved, self._take_arrival()]
        told = [json.loads(line) for line in transport.gather(json.dumps(facts).encode())]
        nodes, has_moved, ways = (tuple(facts) for facts in zip(*told, strict=True))
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
        engine.durable.share_out(engine.members)
        report.met(engine.members.generation, [Arrival(*way) for way in ways if way is not None])
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

    def _put_back(self, restoration: Restoration, *, moved: bool) -> None:
        """Be as the version was.

        Args:
            restoration: the version.
            moved: whether any rank is another one than before.
        """
        assert self._engine.members is not None
        mirroring, version = self._mirroring, restoration.version
        # Those of a rank that is another one now are not those of its new place.
        optimizers_hold = mirroring.optimizers_hold(version) and not moved
        restoration.make_data(self._engine.data_hooks, self._strategy.alone)
        restoration.fill(self._trainer, optimizers_hold=optimizers_hold, index=mirroring.index_of(restoration.layout))
        self._mirroring.host_state.apply(restoration.state)
        self._engine.check_files(restoration)
        self._engine.loggers.restore(restoration.host_state["logs"])
        streams = self._engine.streams
        if moved:
            self._engine.open_data_anew()
        elif streams.opened_for != streams.count:
            self._engine.open_training_data_anew()
        restoration.open_streams(streams)
        if moved or not self._batches.go_back_to(restoration.version):
            self._loops.set_sampler_epochs()
            restoration.move_data(self._loops)
            self._batches.reset()
        restoration.move_streams(streams)
        self._boundaries.last = restoration.version
        progress_bar.show_position(self._trainer, afresh=not self._has_trained)
        self._has_trained = True
        restoration.resume(self._mirroring, self._engine.report, self._engine.members)

    def _give_up(self, reason: str) -> NoReturn:
        """End this process, so that the agent takes the next rung."""
        self._move(WorkerEvent.GIVE_UP)
        if self._watcher is not None:
            self._watcher.send(CannotRecover(reason, lasting=False))
        leave_process()

    def _move(self, event: WorkerEvent) -> None:
        self.state = next_state(self.state, event)


def run_through_faults(engine: Engine, batches: BatchLog) -> None:
    """Have a recovery loop run the fit loop of an engine's trainer.

    Args:
        engine: attached to its trainer.
        batches: those in flight.
    """
    assert engine.mirroring is not None and engine.boundaries is not None, "the engine is attached"
    loop = RecoveryLoop(engine, engine.mirroring, batches, engine.boundaries)
    engine.loops.before_end_of_run(loop.ask_to_leave)
    if engine.members is None:
        engine.loops.run_by(lambda _: loop.join_and_run())
    else:
        engine.loops.run_by(lambda run: loop.run(engine.entered_by(run)))
