"""The engine attached to a strategy: creates the parts of one `fit`, connects them, and passes on the trainer's calls.

It decides nothing. The parts are created when what they need is known:

| Once | Part |
|---|---|
| the strategy enters `fit` | `session`, `data` |
| the process has entered the run: `begin` or `begin_alone` | the arena and the member set of the session, the entry |
| the model is set up: `attach` | `running`, the restore procedure, the recovery loop |
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from lightning_ckptless.console import CONSOLE, Bar, WarningsOnConsole
from lightning_ckptless.internals.lightning import progress_bar
from lightning_ckptless.membership.channel.agent_channel import AgentChannel
from lightning_ckptless.membership.channel.exit_report import ExitReport, write_exit_report
from lightning_ckptless.protocol.hang_detection import Point
from lightning_ckptless.protocol.startup import StartPlan
from lightning_ckptless.protocol.time_account import Bucket
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena_notes import ArenaNotes
from lightning_ckptless.trainer.data.hooks import from_note, to_note
from lightning_ckptless.trainer.data.training_data import TrainingData
from lightning_ckptless.trainer.data.virtual_ranks import VirtualRanks
from lightning_ckptless.trainer.outputs.loggers import Positions
from lightning_ckptless.trainer.recovery.fit_resume import run_restored
from lightning_ckptless.trainer.recovery.recovery_loop import RecoveryLoop
from lightning_ckptless.trainer.recovery.regrouping import Regrouping
from lightning_ckptless.trainer.recovery.restoration import Restoration
from lightning_ckptless.trainer.recovery.restore_procedure import RestoreProcedure
from lightning_ckptless.trainer.recovery.retries import why_final
from lightning_ckptless.trainer.recovery.version_fetch import fetch_version
from lightning_ckptless.trainer.reporting.rank_ledger import WarningsInLedger
from lightning_ckptless.trainer.rewind.rewind_procedure import RewindProcedure
from lightning_ckptless.trainer.session.fit_entry import enter_alone, enter_together
from lightning_ckptless.trainer.session.running_fit import RunningFit
from lightning_ckptless.trainer.session.session import Session


class Engine:
    """Fault tolerance of one call of `fit`.

    Args:
        strategy: strategy of the trainer; owns the process groups, and a watcher if one of our agents is listening.
        trainer: trainer in `fit`, before anything of it is set up.
        fit_index: number of earlier calls of `fit` in this process.
        channel: channel to one of our agents; None under an external agent.

    Attributes:
        session: this rank's part in the run.
        data: data of the trainer.
        running: the fit; None until its model is set up.
    """

    def __init__(self, strategy: Any, trainer: Any, fit_index: int, channel: AgentChannel | None = None) -> None:
        self.strategy = strategy
        self.trainer = trainer
        self.session = Session(strategy, trainer, fit_index, channel)
        self.data = TrainingData(trainer, strategy.make_virtual_ranks(trainer))
        self.running: RunningFit | None = None
        self._restoration: Restoration | None = None
        self._warnings = WarningsOnConsole(partial(progress_bar.say, trainer))
        self._recorded = WarningsInLedger(self.session.report.ledger)

    @property
    def virtual_ranks(self) -> VirtualRanks:
        """The virtual ranks that this rank runs."""
        return self.data.virtual_ranks

    @property
    def generation(self) -> int:
        """Number of the generation that this rank joined last."""
        return self.session.generation

    # ------------------------------------------------------------------ entering

    def begin(self, ckpt_path: str | None, first_positions: Positions | None = None) -> StartPlan:
        """Enter the run together with all other ranks; see `enter_together`."""
        entry = enter_together(self.session, self.virtual_ranks, ckpt_path, first_positions)
        self._restoration = entry.restoration
        return entry.plan

    def begin_alone(self) -> StartPlan:
        """Prepare to join the others inside `fit`, as far as that is possible without them."""
        return enter_alone(self.session).plan

    def attach(self) -> None:
        """Capture versions and recover from faults from now on: model, optimizers and loops are set up."""
        trainer, session, loops, watcher = self.trainer, self.session, self.data.loops, self.strategy.watcher
        session.loggers.watch()
        CONSOLE.bar = progress_bar.bar_kind(trainer)
        # In this order: the first does nothing if there is a handler already.
        self._warnings.attach()
        self._recorded.attach()
        session.request_writer()
        session.request_health_watch()
        session.note_folders()
        if session.is_member:
            session.loggers.note(session.members)
        since = None if self._restoration is None else self._restoration.version
        running = self.running = RunningFit(session, self.data, watcher, since, lambda: self._will_restore)
        self._begin_data_hooks(running)
        loops.around_setup_of_data(self.data.before_setup, self.data.after_setup)
        procedure = RestoreProcedure(session, self.data, running, self.strategy.alone)
        fetch = partial(fetch_version, session, self.data.virtual_ranks)
        regrouping = Regrouping(self.strategy, session, self.data, running, fetch, procedure, watcher)
        rewind = RewindProcedure(session, self.data, running, procedure)
        loop = RecoveryLoop(self.strategy, session, loops, running.progress, regrouping, rewind, watcher)
        loops.before_end_of_run(loop.ask_to_leave)
        if session.is_member:
            loops.run_by(lambda run: loop.run(self._first(run, procedure)))
        else:
            loops.run_by(lambda _: loop.join_and_run())

    def _begin_data_hooks(self, running: RunningFit) -> None:
        session, hooks, restoration = self.session, self.data.hooks, self._restoration
        hooks.begin(
            lambda: running.rank_state.host_state,
            lambda records: session.arena.write_notes(ArenaNotes(data_hooks={session.rank: to_note(records)})),
            is_new=self._will_restore,
        )
        if not session.is_member:
            hooks.expect(from_note(session.arena.notes().data_hooks.get(session.rank)))
        elif restoration is not None:
            hooks.expect(restoration.host_state["data_hooks"])

    def _first(self, run: Callable[[], None], procedure: RestoreProcedure) -> Callable[[], None]:
        """Return what enters the fit loop: from its beginning, as Lightning does, or at the restored position."""
        restoration = self._restoration
        if restoration is None:
            return run

        def enter() -> None:
            # If a fault ends this attempt, the next version comes from the recovery loop.
            self._restoration = None
            run_restored(
                self.data.loops,
                lambda start_hooks: procedure.apply(restoration, survivor=False, start_hooks=start_hooks),
            )

        return enter

    # ------------------------------------------------------------------ the state of this process

    @property
    def is_at_beginning(self) -> bool:
        """Whether this process starts the fit from its beginning, without restoring a version."""
        return self.session.is_member and self._restoration is None

    @property
    def is_joining(self) -> bool:
        """Whether this process is a replacement that has not joined the others yet."""
        return bool(self.strategy.joins_alone) and not self.session.is_member

    @property
    def _will_restore(self) -> bool:
        return not self.session.is_member or self._restoration is not None

    @property
    def is_run_over(self) -> bool:
        """Whether waiting for the agent's decision on a fault is pointless: the run ends, or no decision will come."""
        if self.running is not None and self.running.end.was_signalled:
            return True
        return self.strategy.watcher is not None and bool(self.strategy.watcher.is_run_over)

    # ------------------------------------------------------------------ calls of the strategy in the loop

    def on_train_start(self) -> None:
        """Called when the hooks of a starting fit have run in this process."""
        if self.running is not None:
            self.running.note_start()

    def at_batch_start(self, batch: Any) -> None:
        """Record which step has begun, and run the replay check if it is due."""
        if self.running is not None:
            self.running.at_batch_start(batch)

    def beat(self, point: Point) -> None:
        """Report this rank's position in the step, which identifies hung ranks; raises if the agent has aborted it."""
        if self.running is not None:
            self.running.progress.beat(point)

    def before_backward(self) -> None:
        """Report that the forward pass is complete, and observe which gradients the backward pass adds to."""
        if self.running is not None:
            self.session.report.time.end_own_work()
            self.running.rank_state.before_backward()
            self.running.progress.beat(Point.BACKWARD)

    def before_optimizer_step(self) -> None:
        """Wait until the current version has been copied: the optimizer is about to change the tensors."""
        if self.running is not None:
            self.running.mirroring.before_optimizer_step()

    def writing_checkpoint(self) -> AbstractContextManager[None]:
        """Context in which this rank writes a checkpoint file."""
        return self.session.report.time.spending(Bucket.CHECKPOINT_WAIT)

    def saving_checkpoint(self, path: str) -> None:
        """Called before this rank writes a checkpoint file."""
        if not self._is_ending:
            self.session.files.saving(path, self._taken)

    def saved_checkpoint(self, path: str) -> None:
        """Called after this rank has written a checkpoint file."""
        if not self._is_ending:
            self.session.files.written(path)

    def removing_checkpoint(self, path: str) -> bool:
        """Called before this rank removes a checkpoint file; returns whether the removal has been handled."""
        return not self._is_ending and self.session.files.removing(path, self._taken)

    @property
    def _taken(self) -> Version | None:
        return self.running.mirroring.taken if self.running is not None else None

    @property
    def _is_ending(self) -> bool:
        # No later start replays a step from here on, so files written now stay as they are.
        return self.running is not None and self.running.end.is_over

    # ------------------------------------------------------------------ end

    def why_final(self, error: Exception) -> str | None:
        """Why an exception is final; None if it is worth a retry."""
        return why_final(error, rank=self.session.rank, taken=self._taken, arena=self.session.arena_if_open)

    def forbid_relaunch(self, reason: str) -> None:
        """Tell our agent not to relaunch the workers."""
        write_exit_report(ExitReport(self.session.rank, final=True, reason=reason))

    def finish(self) -> None:
        """Called when `fit` has returned: wait for the last version and report the outcome."""
        if self.running is not None:
            self.running.mirroring.settle()
        self.session.finish()

    def close(self) -> None:
        """Restore the loops' original methods, and release threads and mappings."""
        if self.running is not None:
            self.running.detach()
        self.data.loops.give_back()
        self.session.loggers.release()
        self._recorded.detach()
        self._warnings.detach()
        CONSOLE.bar = Bar.NONE
        if self.running is not None:
            self.running.close()
        self._restoration = None
        self.session.close()
