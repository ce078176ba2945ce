"""The engine attached to a strategy: opens the arena, mirrors every version, restores one after a fault.

It orchestrates and decides nothing. `protocol` decides what to restore, `replica` moves the bytes, `commit` defines
when a version exists, `fit_resume` enters the loops, and `recovery_loop` interprets errors raised in them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lightning_ckptless import environment
from lightning_ckptless.configuration.variables import with_variables
from lightning_ckptless.console import CONSOLE, Bar, WarningsOnConsole
from lightning_ckptless.internals.lightning import progress_bar
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.sigterm import SigtermFlag
from lightning_ckptless.internals.lightning.virtual_ranks import open_training_data
from lightning_ckptless.ledger import Ledger
from lightning_ckptless.membership.channel.agent_channel import AgentChannel
from lightning_ckptless.membership.channel.exit_report import ExitReport, mark_begun, write_exit_report
from lightning_ckptless.membership.worker.progress import ProgressWriter, stacks_path
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.checkpoint_history import BEGINNING
from lightning_ckptless.protocol.hang_detection import Point
from lightning_ckptless.protocol.messages import StepCommitted
from lightning_ckptless.protocol.startup import StartAction, StartPlan
from lightning_ckptless.protocol.versions import Complete, Version
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.arena_notes import ArenaNotes, RankFolders
from lightning_ckptless.replica.transport import GlooTransport, SoloTransport, Transport
from lightning_ckptless.system.reaper import MARKER
from lightning_ckptless.trainer.commit.begun_step import BegunStep
from lightning_ckptless.trainer.commit.durable import DurableRung
from lightning_ckptless.trainer.commit.mirroring import Mirroring
from lightning_ckptless.trainer.commit.step_boundaries import StepBoundaries
from lightning_ckptless.trainer.data.batch_log import BatchLog
from lightning_ckptless.trainer.data.hooks import DataHooks, from_note, to_note
from lightning_ckptless.trainer.data.loader import make_resumable
from lightning_ckptless.trainer.data.virtual_ranks import VirtualRanks
from lightning_ckptless.trainer.recovery.fetch import fetch_version
from lightning_ckptless.trainer.recovery.fit_resume import run_restored
from lightning_ckptless.trainer.recovery.judgement import count_recovery, why_final
from lightning_ckptless.trainer.recovery.restoration import Restoration
from lightning_ckptless.trainer.reporting.checkpoint_files import CheckpointFiles
from lightning_ckptless.trainer.reporting.loggers import Positions, RunLoggers
from lightning_ckptless.trainer.reporting.lost_files import lost_logs, warning_of
from lightning_ckptless.trainer.reporting.report import RunReport
from lightning_ckptless.trainer.session.arenas import (
    discard_if_empty,
    find_or_make_arena,
    is_first_of_node,
    local_rank,
    open_arena,
    register_with_reaper,
    use_agent_memory,
)
from lightning_ckptless.trainer.session.identity import Identity, identify
from lightning_ckptless.trainer.session.member_set import MemberSet, form_member_set
from lightning_ckptless.trainer.session.rate_search import RateSearches
from lightning_ckptless.trainer.session.run_folders import RunFolders
from lightning_ckptless.trainer.session.startup import Sources, decide_start

COMMIT_TIMEOUT_S = 1800.0


class Engine:
    """Fault tolerance of one call of `fit`.

    Args:
        strategy: strategy of the trainer; owns the process groups, and a watcher if one of our agents is listening.
        trainer: trainer in `fit`, before anything of it is set up.
        fit_index: number of earlier calls of `fit` in this process.
        line: channel to one of our agents; None under a foreign agent.
    """

    def __init__(self, strategy: Any, trainer: Any, fit_index: int, line: AgentChannel | None = None) -> None:
        self.strategy = strategy
        self.trainer = trainer
        self.options: CkptlessOptions = with_variables(strategy.options)
        self.fit_index = fit_index
        self.probes: list[Callable[[str, Version], None]] = strategy.probes
        self.rank: int = trainer.global_rank
        self.world_size: int = trainer.world_size
        self.identity: Identity = identify(trainer)
        self.run_folder: Path = self.identity.run_folder
        self.virtual_ranks: VirtualRanks = strategy.make_virtual_ranks(trainer)
        self.durable = DurableRung(self.identity, fit_index, self.options)
        self.loggers = RunLoggers(trainer, self.run_folder, fit_index)
        self.folders = RunFolders(trainer)
        self._line = line
        self.ledger = Ledger(self.run_folder / "ledger.jsonl")
        self.loops = FitLoops(trainer)
        self.data_hooks = DataHooks(trainer, self.loops)
        self.loops.iterate_data_through(make_resumable)
        self.report = RunReport(trainer, self.ledger, strategy.world.generation)
        self.files = CheckpointFiles(self.ledger, fit_index, self.report.report_files)
        self.arena: Arena | None = None
        self.members: MemberSet | None = None
        self.mirroring: Mirroring | None = None
        self.has_moved = False
        self._restoration: Restoration | None = None
        self.boundaries: StepBoundaries | None = None
        self._sigterm: SigtermFlag | None = None
        self._stepped_in = 0
        self._progress: ProgressWriter | None = None
        self._searches: RateSearches | None = None
        self._warnings = WarningsOnConsole(partial(progress_bar.say, trainer))

    @property
    def generation_record(self) -> Path:
        """File that holds the number of the last generation of this fit."""
        return self.run_folder / f"generation-of-fit-{self.fit_index}"

    def interrupt(self) -> None:
        """Report that a fault has ended the step and a recovery begins."""
        if self._progress is not None:
            self._progress.interrupt()

    def restoring(self) -> None:
        """Report progress in restoring a version together with the others."""
        if self._progress is not None:
            self._progress.restore()

    def adopt_rank(self, env: Mapping[str, str]) -> None:
        """Adopt the rank that the agent assigns; does nothing if this process already has it.

        Args:
            env: environment variables that define the rank.
        """
        strategy, trainer = self.strategy, self.trainer
        os.environ.update(env)
        if (trainer.global_rank, trainer.world_size) == (self.rank, self.world_size):
            return
        self.has_moved = True
        strategy.set_world_ranks()
        self.rank, self.world_size = trainer.global_rank, trainer.world_size
        place, places, _ = strategy.place_among_virtual_ranks()
        self.virtual_ranks.place_at(place, places)
        if self.arena is not None:
            self._begun = BegunStep(self.arena.path, self.rank)
            self.loggers.hold(self.arena.path)

    def reopen_data(self) -> None:
        """Reopen all data after some process has changed its rank. All ranks do it."""
        self.has_moved = False
        self.loops.forget_validation_data()
        self.reopen_training_data()

    def reopen_training_data(self) -> None:
        """Reopen this rank's share of the training data; involves no other rank."""
        with self.data_hooks.as_made():
            self.loops.replace_training_data(open_training_data(self.trainer))
        self.virtual_ranks.opened_for = self.virtual_ranks.count

    @property
    def generation(self) -> int:
        """Number of the generation that this rank joined last."""
        return self.members.generation if self.members is not None else int(self.strategy.world.generation)

    # ------------------------------------------------------------------ begin

    def begin(self, ckpt_path: str | None, first_positions: Positions | None = None) -> StartPlan:
        """Open the arena and decide what this generation starts from.

        Args:
            ckpt_path: checkpoint file that the script passed to `fit`.
            first_positions: positions of the log files when `fit` was first entered; None if they were empty.

        Raises:
            LaunchError: the limit on recoveries has been reached.
            StateMissingError: no complete version is left and the options say to stop.
            WorldSizeError: another number of ranks wrote the state, and these cannot continue from it.
            OptionsError: the checkpoint path and a live arena disagree, or replicas cannot be placed.
        """
        transport, opens = self.connect(), is_first_of_node(local_rank())
        self.arena, nodes = open_arena(
            self.identity, self.fit_index, self.options, transport, opens=opens, origin=ckpt_path
        )
        use_agent_memory(self.arena, self._line)
        if opens and not self.identity.own_agent:
            register_with_reaper(self.arena, self.identity)
        relaunched, states = self.generation > 1, self.durable.states(transport)
        after = max((state.snapshot.generation for state in states), default=0)
        mesh = self.strategy.mesh_sizes()
        members = self.members = form_member_set(
            transport,
            self.arena,
            nodes,
            self.options,
            self.generation,
            record=self.generation_record,
            after=after,
            mesh=mesh,
        )
        self.folders.adopt(members.noted.folders, self.rank)
        self.durable.assign_writer(members)
        self.report.generation = members.generation
        saved = members.noted.logger_identities
        self.loggers.hold(self.arena.path)
        self.loggers.identify(saved)
        if saved is None and self.trainer.is_global_zero:
            self.loggers.warn_of_unknown_loggers()
        sources = Sources(self.durable, states, ckpt_path, saved is not None)
        plan, found = decide_start(self.trainer, members, self.options, sources, relaunched=relaunched)
        had_ended = plan.action is StartAction.RESTORE and relaunched and members.noted.finished
        self.report.started(
            self.identity, plan, members.placement, self.arena.path, fit_index=self.fit_index, had_ended=had_ended
        )
        if plan.action is StartAction.REFUSE:
            assert plan.error is not None
            raise plan.error(plan.reason)
        if plan.enters_midway:
            assert isinstance(found, Complete)
            if plan.state is not None:
                self.loggers.identify(self.durable.logger_identities(plan.state))
            self._restoration = self.fetch(found)
            self.virtual_ranks.opened_for = self.virtual_ranks.count
            self.check_files(self._restoration)
            if (logs := self._restoration.host_state["logs"]) is not None:
                self.loggers.cut(logs)
        else:
            self.virtual_ranks.require()
            logs = None if saved is None else first_positions or self.loggers.at_first
            self._start_over(members, plan.action, logs, relaunched=relaunched)
        return plan

    def begin_alone(self) -> None:
        """Prepare to join the others inside `fit`, as far as that is possible without them."""
        self.arena = find_or_make_arena(self.identity, self.fit_index, self.options)
        use_agent_memory(self.arena, self._line)
        self.folders.adopt(self.arena.notes().folders, self.rank)
        self.loggers.hold(self.arena.path)
        self.loggers.identify_alone(self.arena)
        self.loggers.keep()

    def connect(self) -> Transport:
        """Connect the ranks of the generation."""
        if self.world_size == 1:
            return SoloTransport()
        return GlooTransport(self.strategy.world.host_group(COMMIT_TIMEOUT_S))

    def fetch(self, found: Complete) -> Restoration:
        """Fetch a version. All ranks call it together.

        Raises:
            LaunchError: under a foreign agent: the limit on recoveries has been reached.
        """
        assert self.members is not None
        if not self.identity.own_agent:
            count_recovery(self.members, found.snapshot.version, self.options)
        batch = self.options.elastic_batch
        return fetch_version(self.trainer, found, self.members, self.virtual_ranks, batch, self.report, self.files)

    def check_files(self, restoration: Restoration) -> None:
        """Warn of files that changed since a version; called before log files are truncated to it."""
        logs = restoration.host_state["logs"]
        positions = None if logs is None else logs["files"]
        if lost := [*lost_logs(self.trainer, positions), *self.files.lost]:
            self.report.report_files(warning_of(lost, restoration.version))

    def _start_over(self, members: MemberSet, action: StartAction, logs: Positions | None, *, relaunched: bool) -> None:
        if self.trainer.is_global_zero and relaunched and action is StartAction.FRESH:
            self.files.roll_back(BEGINNING, generation=members.generation)
        elif self.trainer.is_global_zero:
            self.files.begin(generation=members.generation, new_run=action is StartAction.FRESH)
        members.transport.agree(True)
        if members.speaks_for_node:
            members.arena.clear()
        self.loggers.start_over()
        if action is StartAction.DURABLE:
            self.loggers.start_new_runs()
        elif logs is not None:
            self.loggers.cut_to(logs)

    # ------------------------------------------------------------------ run

    def attach(self) -> BatchLog:
        """Capture versions at the commit points; called when the model, its optimizers and the loops are set up.

        Returns:
            The batches in flight.
        """
        trainer, loops, arena = self.trainer, self.loops, self.arena
        assert arena is not None
        self.loggers.watch()
        CONSOLE.bar = progress_bar.bar_kind(trainer)
        self._warnings.attach()
        if is_first_of_node(local_rank()):
            self.durable.order_writer(arena, self._line)
        self._note_folders(arena)
        if self.members is not None:
            self.loggers.note(self.members)
        self._begun = BegunStep(arena.path, self.rank)
        self._open_progress()
        # Twice the batches of a step: the previous step's copy may still be in progress.
        every_step = self.options.mirror_every_n_steps == 1
        batches = BatchLog(loops, lambda: (2 * trainer.accumulate_grad_batches + 2) * every_step)
        sigterm = self._sigterm = SigtermFlag(trainer)
        mirroring = self.mirroring = Mirroring(
            trainer,
            loops,
            self.options,
            self.report,
            batches,
            self.virtual_ranks,
            self.loggers,
            self.data_hooks,
            self._probe,
            sigterm,
            lambda: self.finish_asked,
        )
        if self.members is not None:
            mirroring.join(self.members)
        restoration = self._restoration
        self._begin_data_hooks(mirroring, arena, restoration)
        note = self.run_folder / f"search-{self.fit_index}"
        self._searches = RateSearches(trainer, loops, self.data_hooks, lambda: self._will_restore, note)
        since = restoration.version if restoration is not None else None
        mirroring.taken = since
        self.boundaries = StepBoundaries(
            loops,
            self._commit,
            every_n_steps=lambda: mirroring.mirror_interval.interval,
            since=since,
            before_batch=batches.watch,
            ends_here=mirroring.ends_here,
            before_hooks=mirroring.wait_copied,
            after_batch=mirroring.end_if_asked,
            training=sigterm.show,
        )
        loops.before_setup_of_data(self.virtual_ranks.begin_epoch)
        return batches

    def entered_by(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return what enters the fit loop: at the restored position, or as Lightning does.

        Args:
            run: runs the loop from its beginning.
        """
        return run if self._restoration is None else partial(self._run_restored, self._restoration)

    def _note_folders(self, arena: Arena) -> None:
        """Record the folders of all ranks once the first processes of this fit have determined theirs."""
        if self.members is not None and self.members.noted.folders is None:
            folders = tuple(map(RankFolders.from_value, self.members.gather(asdict(self.folders.own()))))
            if self.members.speaks_for_node:
                arena.write_notes(ArenaNotes(folders=folders))

    def _begin_data_hooks(self, mirroring: Mirroring, arena: Arena, restoration: Restoration | None) -> None:
        self.data_hooks.begin(
            lambda: mirroring.host_state,
            lambda records: arena.write_notes(ArenaNotes(data_hooks={self.rank: to_note(records)})),
            is_new=self.members is None or restoration is not None,
        )
        if self.members is None:
            self.data_hooks.expect(from_note(arena.notes().data_hooks.get(self.rank)))
        elif restoration is not None:
            self.data_hooks.expect(restoration.host_state["data_hooks"])

    def _run_restored(self, restoration: Restoration) -> None:
        """Enter the loops at the restored position, after a start of all processes."""
        mirroring = self.mirroring
        assert mirroring is not None and self.members is not None
        members = self.members

        def restore() -> None:
            restoration.fill(self.trainer)
            mirroring.host_state.apply(restoration.state, with_settings=False)

        def settle() -> None:
            restoration.make_data(self.data_hooks, self.strategy.alone)
            mirroring.host_state.apply(restoration.state)
            self.loggers.restore(restoration.host_state["logs"])
            self.loops.set_sampler_epochs()
            restoration.open_virtual_ranks(self.virtual_ranks)
            restoration.move_data(self.loops)
            restoration.move_virtual_ranks(self.virtual_ranks)
            progress_bar.show_position(self.trainer, afresh=True)
            restoration.resume(mirroring, self.report, members)

        self._restoration = None
        run_restored(self.loops, validation_done=restoration.version.validation_done, restore=restore, settle=settle)

    def detach(self) -> None:
        """Restore the loops' original methods."""
        if self.boundaries is not None:
            self.boundaries.remove()
        self.loops.give_back()
        if self._searches is not None:
            self._searches.give_back()
        if self._sigterm is not None:
            self._sigterm.remove()

    # ------------------------------------------------------------------ in the loop

    @property
    def is_at_beginning(self) -> bool:
        """Whether this process starts the fit from its beginning, without restoring a version."""
        return self.members is not None and self._restoration is None

    @property
    def is_joining(self) -> bool:
        """Whether this process is a replacement that has not met the others yet."""
        return bool(self.strategy.joins_alone) and self.members is None

    @property
    def _will_restore(self) -> bool:
        return self.members is None or self._restoration is not None

    @property
    def finish_asked(self) -> bool:
        """Whether this rank was asked to end the run after the current step."""
        watcher = self.strategy.watcher
        return self._got_sigterm or (watcher is not None and watcher.finish_asked)

    @property
    def is_run_over(self) -> bool:
        """Whether waiting for the agent's decision on a fault is pointless: the run ends, or no decision will come."""
        return self._got_sigterm or (self.strategy.watcher is not None and self.strategy.watcher.is_run_over)

    @property
    def _got_sigterm(self) -> bool:
        return self._sigterm is not None and self._sigterm.asked

    def at_batch_start(self) -> None:
        """Record which step has begun."""
        self._begun.stamp(self.trainer.global_step + 1)
        self.virtual_ranks.fetch()
        self.deliver_rows()
        if self.mirroring is not None:
            self.mirroring.mirror_interval.begin_step(self.trainer.global_step)
        self.beat(Point.BATCH)

    def beat(self, point: Point) -> None:
        """Report this rank's position in the step, which identifies hung ranks; raises if the agent has aborted it."""
        if self._progress is not None and self.members is not None and not self.trainer.sanity_checking:
            self.strategy.watcher.heed()
            done = point in (Point.COMMIT, Point.VALIDATION)
            out_of_data = done and self.loops.is_out_of_data
            step = self.trainer.global_step + (not done)
            self._progress.beat(step, point, self.trainer.current_epoch, out_of_data=out_of_data)

    def _commit(self, version: Version) -> None:
        assert self.mirroring is not None and self.boundaries is not None
        self.beat(Point.COMMIT)
        self.deliver_rows()
        self.mirroring.commit(version)
        self.files.settle(self.mirroring.committed)
        if self.boundaries.closes_validation(version):
            # Callers that read the metrics of a validation get them now, not a step later.
            self.mirroring.settle()
            self.deliver_rows()
        if self.strategy.watcher is not None and self._stepped_in != self.report.generation:
            self._stepped_in = self.report.generation
            self.strategy.watcher.send(StepCommitted())

    def _open_progress(self) -> None:
        self._progress = ProgressWriter.from_environment() if self.strategy.watcher is not None else None
        if self._progress is not None:
            self._progress.dump_stacks_into(stacks_path(Path(os.environ[environment.AGENT_DIR]), local_rank()))

    def before_optimizer_step(self) -> None:
        """Wait until the current version has been copied: the optimizer is about to change the tensors."""
        if self.mirroring is not None:
            self.mirroring.before_optimizer_step()

    def deliver_rows(self) -> None:
        """Deliver the rows of all committed steps to the loggers."""
        if self.mirroring is not None and self.mirroring.mirror is not None:
            self.loggers.deliver(self.mirroring.mirror.committed)

    def leave_loop(self) -> None:
        """Report that the fit loop has ended; from here on ranks are no longer in step."""
        if self._progress is not None:
            self._progress.outside()

    def probe_recovery(self, moment: str) -> None:
        """Notify the probes of a moment in a recovery; they receive the last step begun before it."""
        assert self.arena is not None
        begun = max((int(path.read_text() or 0) for path in self.arena.path.glob("begun-by-*")), default=0)
        for probe in list(self.probes):
            probe(moment, Version(begun, False))

    def _probe(self, moment: str, version: Version) -> None:
        if moment == "committed" and self.report.committed(version):
            mark_begun(self.rank)
            # Done here because it waits for gloo's threads, and training does not wait for this thread.
            self.strategy.world.release()
            if is_first_of_node(local_rank()) and self.arena is not None:
                self.arena.write_notes(ArenaNotes(committed=version))
        for probe in list(self.probes):
            probe(moment, version)

    def saving_checkpoint(self, path: str) -> None:
        """Called before this rank writes a checkpoint file."""
        if not self._is_asked_to_end:
            self.files.saving(path, self._taken, generation=self.generation)

    def saved_checkpoint(self, path: str) -> None:
        """Called after this rank has written a checkpoint file."""
        if not self._is_asked_to_end:
            self.files.written(path, generation=self.generation)

    def removing_checkpoint(self, path: str) -> bool:
        """Called before this rank removes a checkpoint file; returns whether the removal has been handled."""
        return not self._is_asked_to_end and self.files.removing(path, self._taken, generation=self.generation)

    @property
    def _taken(self) -> Version | None:
        return self.mirroring.taken if self.mirroring is not None else None

    @property
    def _is_asked_to_end(self) -> bool:
        # No later start replays a step from here on, so files written now stay as they are.
        return self.mirroring is not None and self.mirroring.is_over

    # ------------------------------------------------------------------ end

    def why_final(self, error: Exception) -> str | None:
        """Why an exception is not worth a retry; None if it is."""
        return why_final(error, rank=self.rank, taken=self._taken, arena=self.arena)

    def leave_verdict(self, reason: str) -> None:
        """Tell our agent not to relaunch the workers."""
        write_exit_report(ExitReport(self.rank, final=True, reason=reason))

    def finish(self) -> None:
        """Called when `fit` has returned: wait for the last version and report the outcome."""
        if self.mirroring is not None:
            self.mirroring.settle()
        if is_first_of_node(local_rank()) and self.arena is not None:
            self.arena.write_notes(ArenaNotes(finished=True))
            (self.arena.path / MARKER).touch()
        self.report.finished()

    def discard_empty_arena(self) -> None:
        """Remove the arena after a start that failed before anything was mirrored: there is nothing to resume from."""
        if self.arena is not None and is_first_of_node(local_rank()):
            discard_if_empty(self.arena)

    def close(self) -> None:
        """Release threads and mappings; the arena stays for a relaunch and is removed by the agent."""
        self.detach()
        self.loggers.release()
        self._warnings.detach()
        CONSOLE.bar = Bar.NONE
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        if self.mirroring is not None:
            self.mirroring.close()
        self.files.close()
        self._restoration = None
        if self.members is not None:
            self.members.transport.close()
        if self.arena is not None:
            self.arena.close()
