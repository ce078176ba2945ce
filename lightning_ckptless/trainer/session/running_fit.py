"""A fit whose model and loops are set up: what happens at each point of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.membership.channel.exit_report import mark_begun
from lightning_ckptless.membership.worker.watcher import Watcher
from lightning_ckptless.protocol.hang_detection import Point
from lightning_ckptless.protocol.messages import Rewind, RewindDecided, StepCommitted
from lightning_ckptless.protocol.time_account import Bucket
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena_notes import ArenaNotes
from lightning_ckptless.trainer.audit.micro_batch import MicroBatches
from lightning_ckptless.trainer.audit.replay_check import ReplayCheck
from lightning_ckptless.trainer.audit.replica_audit import Audit
from lightning_ckptless.trainer.commit.mirroring import Mirroring
from lightning_ckptless.trainer.commit.rank_state import RankState
from lightning_ckptless.trainer.commit.run_end import RunEnd
from lightning_ckptless.trainer.commit.step_boundaries import StepBoundaries
from lightning_ckptless.trainer.commit.step_stamps import StepStamps
from lightning_ckptless.trainer.data.batch_log import BatchLog
from lightning_ckptless.trainer.data.training_data import TrainingData
from lightning_ckptless.trainer.reporting.step_progress import StepProgress
from lightning_ckptless.trainer.rewind.rewinding import Rewinding
from lightning_ckptless.trainer.session.learning_rate_search import LearningRateSearches
from lightning_ckptless.trainer.session.session import Session


class RunningFit:
    """One fit from the setup of its model to its end.

    Args:
        session: session of this rank.
        data: data of the trainer.
        watcher: listens to our agent; None under an external agent, or with a single rank.
        since: version that the run starts from; None if it starts from its beginning or joins a run in progress.
        will_restore: returns whether this process is about to restore a version.

    Attributes:
        progress: reports this rank's position in the step.
        batches: the batches in flight.
        end: ends the run on request.
        rewinding: takes the run back to an earlier step on request.
        rank_state: captures the non-tensor part of a version.
        mirroring: captures versions.
        boundaries: the points at which versions are captured.
        has_started: whether all hooks of a starting fit have run in this process.
    """

    def __init__(
        self,
        session: Session,
        data: TrainingData,
        watcher: Watcher | None,
        since: Version | None,
        will_restore: Callable[[], bool],
    ) -> None:
        trainer, loops = session.trainer, data.loops
        self.progress = StepProgress(session, loops, watcher)
        # Twice the batches of a step: the previous step's copy may still be in progress.
        every_step = session.options.mirror_every_n_steps == 1 or session.device_tier is not None
        self.batches = BatchLog(loops, lambda: (2 * trainer.accumulate_grad_batches + 2) * every_step)
        self.end = RunEnd(trainer, watcher)
        audit = Audit(session, since)
        self.rewinding = Rewinding(session, loops, self._answer, audit)
        self.rank_state = RankState(session, data, self.batches, self.rewinding)
        mirroring = self.mirroring = Mirroring(
            session, self.rank_state, self.end, self.rewinding, audit, self._probe, since
        )
        self.boundaries = StepBoundaries(
            loops,
            self._commit,
            every_n_steps=mirroring.every_n_steps,
            since=since,
            before_batch=self._before_batch,
            ends_here=mirroring.ends_here,
            before_hooks=mirroring.wait_copied,
            after_batch=mirroring.end_if_asked,
            training=self.end.show_signal,
        )
        self._replay_check = self._make_replay_check(session)
        self.has_started = False
        self._session = session
        self._trainer = trainer
        self._loops = loops
        self._virtual_ranks = data.virtual_ranks
        self._watcher = watcher
        if watcher is not None:
            watcher.rewind = self._ask_to_rewind
        self._stamps = StepStamps(session.arena.path)
        self._stepped_in = 0
        note = session.run_folder / f"search-{session.fit_index}"
        self._searches = LearningRateSearches(trainer, loops, data.hooks, will_restore, note)
        clock = session.report.time
        loops.around_fetches(lambda: clock.enter(Bucket.DATA_WAIT), clock.leave)
        loops.around_validation(lambda: clock.spending(Bucket.VALIDATION))

    def _make_replay_check(self, session: Session) -> ReplayCheck | None:
        every_n_steps = session.options.replay_check_every
        if every_n_steps is None:
            return None
        micro_batches = MicroBatches(session.trainer, lambda: self.rank_state.host_state, session.loggers.silenced)
        return ReplayCheck(session, every_n_steps, micro_batches, self.mirroring, self.rewinding)

    # ------------------------------------------------------------------ the points of a step

    def note_start(self) -> None:
        """Record that the hooks of a starting fit have run; objects are watched for changes from now on."""
        self.has_started = True
        self.rank_state.watch_objects()

    def _before_batch(self, fetcher: Any) -> None:
        self._session.report.begin_training()
        self.batches.watch(fetcher)

    def at_batch_start(self, batch: Any) -> None:
        """Record which step has begun, and run the replay check if it is due."""
        self._session.report.time.begin_batch()
        done = self._loops.step
        self._stamps.stamp(self._session.members.rank, done + 1)
        if self._virtual_ranks.carried:
            with self._session.report.time.spending(Bucket.DATA_WAIT):
                self._virtual_ranks.fetch()
        self.deliver_rows()
        self.mirroring.mirror_interval.begin_step(done)
        self.progress.beat(Point.BATCH)
        if self._replay_check is not None:
            self._replay_check.run_if_due(batch)

    def _commit(self, version: Version) -> None:
        self.progress.beat(Point.COMMIT)
        self.deliver_rows()
        self.mirroring.commit(version)
        self._session.files.settle(self.mirroring.committed, self.mirroring.oldest)
        if self.boundaries.closes_validation(version):
            # So that callers that read the metrics of a validation get them now, not a step later.
            self.mirroring.settle()
            self.deliver_rows()
        if self._watcher is not None and self._stepped_in != self._session.generation:
            self._stepped_in = self._session.generation
            self._watcher.send(StepCommitted(self._session.members.sole_shards))

    def _ask_to_rewind(self, asked: Rewind) -> None:
        """Request a rewind on behalf of another terminal; called in the watcher's thread."""
        try:
            self.rewinding.ask(
                to_step=asked.to_step,
                steps=asked.steps,
                skip_batches=asked.skip_batches,
                cause="requested from another terminal",
                request=asked.number,
            )
        except OptionsError as error:
            self._answer(asked.number, False, str(error))

    def _answer(self, request: int, accepted: bool, reason: str) -> None:
        if self._watcher is not None:
            self._watcher.send(RewindDecided(request, accepted, reason))

    def deliver_rows(self) -> None:
        """Deliver the rows of all committed steps to the loggers."""
        if self.mirroring.mirror is not None:
            self._session.loggers.deliver(self.mirroring.mirror.committed)

    def _probe(self, moment: str, version: Version) -> None:
        session = self._session
        # A version in device memory counts once the arenas contain one: a relaunch has nothing else.
        is_committed = moment == "committed" or (moment == "known" and self.mirroring.committed is not None)
        if is_committed and session.report.committed(version):
            mark_begun(session.rank)
            # Done here because it waits for gloo's threads, and training does not wait for this thread.
            session.world.release()
            if session.is_first_of_node:
                session.arena.write_notes(ArenaNotes(committed=version))
        session.probe(moment, version)

    # ------------------------------------------------------------------ the end

    def detach(self) -> None:
        """Restore the original methods of the loops, the callbacks and the signal handling."""
        if self._watcher is not None:
            self._watcher.rewind = self._watcher.refuse_rewind
        self.boundaries.remove()
        self._searches.give_back()
        self.end.remove()

    def close(self) -> None:
        """Release threads and mappings."""
        self.progress.close()
        self._stamps.close()
        self.mirroring.close()
        self.rank_state.release()
