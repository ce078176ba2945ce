"""Capturing versions: at a commit point the trainer's state is captured and handed to the mirror."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter
from typing import Any

from lightning_ckptless.durable.recipe import has_recipe, write_recipe
from lightning_ckptless.errors import TransportError
from lightning_ckptless.formats.packing import pack
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.sigterm import SigtermFlag, sigterm_exception
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.mirror_interval import agreed
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import Arena
from lightning_ckptless.replica.cores import threads_of_a_rank
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import from_message, to_message
from lightning_ckptless.replica.mirror.mirror import Mirror, MirrorSettings
from lightning_ckptless.replica.mirror.round_vote import RoundVote
from lightning_ckptless.trainer.commit.mirror_interval import MirrorInterval
from lightning_ckptless.trainer.commit.rereplication import Rereplication
from lightning_ckptless.trainer.data.batch_log import BatchLog
from lightning_ckptless.trainer.data.hooks import DataHooks
from lightning_ckptless.trainer.data.virtual_ranks import VirtualRanks
from lightning_ckptless.trainer.reporting.loggers import RunLoggers
from lightning_ckptless.trainer.reporting.report import RunReport
from lightning_ckptless.trainer.session.member_set import MemberSet
from lightning_ckptless.trainer.state.checkpoint_recipe import recipe_of
from lightning_ckptless.trainer.state.device_pickle import pack_late
from lightning_ckptless.trainer.state.host_state import HostState
from lightning_ckptless.trainer.state.layout_tensors import describe_state
from lightning_ckptless.trainer.state.static import StaticWatch
from lightning_ckptless.trainer.state.surroundings import Surroundings
from lightning_ckptless.trainer.state.tensors import StateIndex, require_room
from lightning_ckptless.trainer.state.trust import OutgoingCheck
from lightning_ckptless.trainer.strategy.compatibility import warn_of_loaders

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
OBJECT_NOT_CAPTURED = (
    "%s was changed in training, but it is an object, or too large to be captured with every step: after a fault a "
    "replacement starts with its initial value. Keep values that change in a number, a list or an array of their own, "
    "or in `state_dict()` of a callback"
)


class Mirroring:
    """Captures the versions of one trainer, over all generations that it takes part in.

    Args:
        trainer: trainer that is set up for `fit`.
        loops: loops of the trainer.
        options: the user's settings.
        report: receives the costs.
        batches: the batches in flight.
        virtual_ranks: the virtual ranks that this rank runs.
        loggers: loggers of the trainer.
        hooks: dataloader hooks of the trainer.
        probe: called in the mirror thread with the moment of a round and its version.
        sigterm: Lightning's flag for a received SIGTERM.
        finish_asked: returns whether a signal or the agent has asked this rank to end the run.

    Attributes:
        taken: the version that was captured or restored last.
        optimizers_are_of: the version whose state the optimizers hold; None while a step changes it.
        mirror_interval: how often a version is captured.
    """

    def __init__(
        self,
        trainer: Any,
        loops: FitLoops,
        options: CkptlessOptions,
        report: RunReport,
        batches: BatchLog,
        virtual_ranks: VirtualRanks,
        loggers: RunLoggers,
        hooks: DataHooks,
        probe: Callable[[str, Version], None],
        sigterm: SigtermFlag,
        finish_asked: Callable[[], bool],
    ) -> None:
        self.taken: Version | None = None
        self.optimizers_are_of: Version | None = None
        self._ends_here = False
        self._trainer = trainer
        self._loops = loops
        self._options = options
        self._report = report
        self._batches = batches
        self._virtual_ranks = virtual_ranks
        self._loggers = loggers
        self._hooks = hooks
        self._probe = probe
        self._sigterm = sigterm
        self._finish_asked = finish_asked
        self.mirror_interval = MirrorInterval(options, report)
        self._members: MemberSet | None = None
        self._departure: OutgoingCheck | None = None
        self._mirror: Mirror | None = None
        self._seen: Version | None = None
        self._index: StateIndex | None = None
        self._layout: Layout | None = None
        self._host_state: HostState | None = None
        self._rereplication: Rereplication | None = None
        self._static = StaticWatch()
        self._surroundings = Surroundings(trainer, self._warn_of_loss)
        loops.after_setup_of_validation_data(self._surroundings.on_validation_data)

    def watch_objects(self) -> None:
        """Start watching the user's objects for changes; called when the hooks of a starting fit have run."""
        self._surroundings.watch_objects()

    def _warn_of_loss(self, name: str) -> None:
        if self._trainer.is_global_zero:
            log.warning("ckptless: %s", OBJECT_NOT_CAPTURED % name)

    def optimizers_hold(self, version: Version) -> bool:
        """Whether the optimizers still hold the state of a version, for the same parameters."""
        return self.optimizers_are_of == version and self._index is not None and self._index.is_current()

    def index_of(self, layout: Layout) -> StateIndex | None:
        """Where the trainer's tensors are, if they are known to match a layout."""
        known = self._index
        if known is None or self._layout is None or self._layout.digest != layout.digest or not known.is_current():
            return None
        return known

    @property
    def trainer(self) -> Any:
        """The trainer whose versions are captured."""
        return self._trainer

    @property
    def mirror(self) -> Mirror | None:
        """The mirror of this generation; None before its first version."""
        return self._mirror

    @property
    def committed(self) -> Version | None:
        """The newest version that this rank knows to be committed on all ranks."""
        return self._mirror.committed if self._mirror is not None else None

    @property
    def host_state(self) -> HostState:
        """Captures and restores the trainer's host state."""
        if self._host_state is None:
            self._host_state = HostState(self._trainer, self._options, self._surroundings)
        return self._host_state

    # ------------------------------------------------------------------ generations

    def join(self, members: MemberSet) -> None:
        """Mirror among these ranks from now on."""
        self._members = members
        self._departure = OutgoingCheck(self._options, members)

    def resume(self, version: Version, layout: Layout, index: StateIndex, protect: Callable[[], None]) -> None:
        """Resume from a restored version.

        Args:
            version: the version.
            layout: layout of its tensors.
            index: where its tensors are in this trainer.
            protect: makes the replicas that it lacks; all ranks call it together.
        """
        self._index, self._layout = index, layout
        self.taken = self.optimizers_are_of = self._seen = version
        assert self._members is not None
        self._report_plan(version)
        self._rereplication = Rereplication(protect)
        if not has_recipe(self._members.arena.path):
            self._keep_recipe(self._members.arena)

    def _await_rereplication(self) -> None:
        """Wait until the restored version has all its replicas; newer versions are mirrored from here on."""
        rereplication, self._rereplication = self._rereplication, None
        if rereplication is not None:
            assert self._layout is not None
            self._report.waited(rereplication.wait())
            self._open(self._layout, committed=self.taken)

    def abandon(self) -> None:
        """Abandon work in progress: the generation is over, and its connections are aborted."""
        if self._rereplication is not None:
            self._rereplication.abandon(CLOSE_TIMEOUT_S)
            self._rereplication = None
        if self._mirror is not None:
            self._mirror.close(CLOSE_TIMEOUT_S)
            self._mirror = None

    def settle(self) -> None:
        """Wait until the last version is committed."""
        self._await_rereplication()
        if self._mirror is not None:
            self._mirror.settle()

    def close(self) -> None:
        """Release threads and mappings."""
        self.abandon()
        self._index = self._host_state = None

    # ------------------------------------------------------------------ versions

    def ends_here(self) -> bool:
        """Called when a version may be captured; returns whether the run ends with it."""
        mirror = self._mirror
        if self._trainer.world_size == 1:
            self._ends_here = mirror is not None and self._finish_asked()
        else:
            self._ends_here = mirror is not None and mirror.stop.passes()
        return self._ends_here

    @property
    def is_over(self) -> bool:
        """Whether the run has ended on request, and its last hooks are running."""
        return self._sigterm.agreed and bool(self._trainer.interrupted)

    def end_if_asked(self) -> None:
        """End the run after a batch if all ranks have agreed to.

        Raises:
            SIGTERMException: Lightning's own exception, at the point where Lightning raises it.
        """
        if self._is_between_steps() and self._trainer.world_size == 1 and self._finish_asked():
            self.settle()
            self._sigterm.agree()
        if self._sigterm.agreed and not self._sigterm.is_training_done:
            raise sigterm_exception(self._trainer)

    def _is_between_steps(self) -> bool:
        """Whether the last version includes all steps, and later batches will be part of the next one."""
        return self.taken == Version(self._trainer.global_step, True) and not self._loops.step_done()

    def commit(self, version: Version) -> None:
        """Capture a version and hand it to the mirror. Called in the training thread at a commit point."""
        self._await_rereplication()
        self._report.step_done()
        began = perf_counter()
        if self._host_state is None and self._trainer.is_global_zero:
            warn_of_loaders(self._loops.combined_loader.flattened)
            self.host_state.hooks.warn_of_uncovered()
        self.optimizers_are_of = version
        if self._index is None or self._mirror is None or not self._index.is_current() or self._is_to_be_compared():
            self._replan()
            self._report_plan(version)
        self._seen = version
        assert self._index is not None and self._mirror is not None
        if self._options.on_late == "skip" and self._mirror.busy and not self._ends_here:
            self._mirror.skip(version)
            self._report.taken(0.0, perf_counter() - began, self._mirror)
            return
        stall_s = self._submit(version)
        self._batches.forget_before(self._mirror.committed)
        self.taken = version
        spent_s = perf_counter() - began
        self.mirror_interval.took(version, spent_s)
        self._report.taken(stall_s, spent_s, self._mirror)
        agreement = self._mirror.interval_after
        if agreement is not None and agreement[0] < version:
            self.mirror_interval.settle(agreed(agreement[1]))
        if self._ends_here:
            self._mirror.settle()
            self._sigterm.agree()

    def _submit(self, version: Version) -> float:
        assert self._index is not None and self._mirror is not None and self._departure is not None
        tensors = self._index.read()
        blob = pack_late(
            {
                "state": self.host_state.capture(self._batches.position_at(version), tensors),
                "virtual_ranks": self._virtual_ranks.capture(),
                "data_hooks": dict(self._hooks.made),
                "report": self._report.state(),
                "interval": self.mirror_interval.chosen,
                "logs": self._loggers.capture(version, self._departure.may_leave),
            }
        )
        blob = self._departure.checked(blob)
        return self._mirror.submit(version, tensors, blob, blocking_names=self._index.private)

    def take_again(self, version: Version) -> None:
        """Mirror a version that other ranks wrote, and wait until it is committed. All ranks call it together."""
        self.taken = self.optimizers_are_of = self._seen = version
        self._replan()
        self._submit(version)
        assert self._mirror is not None
        if self._mirror.settle() != version:
            raise TransportError(
                f"rank {self._trainer.global_rank}: {version} could not be mirrored by {self._trainer.world_size} "
                "ranks before training resumes: at least one rank did not have all of it"
            )

    def wait_copied(self) -> None:
        """Wait until the current version has been copied, so that its tensors may change."""
        if self._mirror is not None:
            self._report.waited(self._mirror.wait_staged())

    def before_optimizer_step(self) -> None:
        """Wait until the current version has been copied: the optimizer is about to change the tensors."""
        self.wait_copied()
        self.optimizers_are_of = None

    def _is_to_be_compared(self) -> bool:
        """Whether ranks may have just trained for the first time what was identical on all of them until then."""
        return not self._trainer.strategy.replicates and self._seen is not None and self._seen.optimizer_step == 0

    def _replan(self) -> None:
        assert self._members is not None
        if self._mirror is not None:
            self._mirror.settle()
        require_room(self._trainer)
        index = StateIndex(self._trainer)
        static = self._static.look(index)
        mine = to_message(describe_state(index, replicated=self._trainer.strategy.replicates, static=static))
        layout = plan_layout([from_message(line) for line in self._members.transport.gather(mine)])
        # Assigned together: a fault in between must not pair the new index with the previous layout.
        self._index, self._layout = index, layout
        committed = self._mirror.committed if self._mirror is not None else None
        self._open(layout, committed=committed)
        self._keep_recipe(self._members.arena)

    def _report_plan(self, version: Version) -> None:
        assert self._members is not None and self._layout is not None
        layout = self._layout
        self._report.planned(self._members, [layout.bulk_bytes(shard) for shard in range(layout.world_size)], version)

    def _keep_recipe(self, arena: Arena) -> None:
        """Store with the version what else a checkpoint file contains; it changes as rarely as the layout."""
        assert self._members is not None and self._index is not None
        if self._members.speaks_for_node:
            recipe = recipe_of(self._trainer, self._index.read(), self.host_state.callbacks)
            write_recipe(arena.path, pack(recipe))

    def _open(self, layout: Layout, *, committed: Version | None) -> None:
        members = self._members
        assert members is not None
        self._layout = layout
        if self._mirror is not None:
            self._mirror.close()
        if members.speaks_for_node:
            members.arena.write_layout(layout)
        ranks, placement = members.ranks_of_node, members.placement
        members.arena.require_room_for(
            ((shard, rank) for rank in ranks for shard in (rank, *placement.sources(rank))), layout
        )
        self._mirror = Mirror(
            arena=members.arena,
            layout=layout,
            placement=placement,
            transport=members.transport,
            generation=members.generation,
            settings=MirrorSettings(
                self._options.checksum,
                threads_of_a_rank(len(ranks), beside_training=True),
                self._options.staging,
            ),
            committed=committed,
            probe=self._probe,
            vote=lambda complete: RoundVote(complete, not self._finish_asked(), self.mirror_interval.word()),
        )
        self._mirror.bind(self._written_by_hooks(layout))

    def _written_by_hooks(self, layout: Layout) -> frozenset[str]:
        """Parameters that a hook may write to before the optimizer steps; must not be copied while a batch runs."""
        assert self._index is not None
        return self._index.untrained - {chunk.name for chunk in layout.chunks if chunk.static}
