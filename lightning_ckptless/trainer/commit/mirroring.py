"""Capturing versions: at a commit point the trainer's state is captured and handed to the mirror."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from torch import Tensor

from lightning_ckptless.durable.recipe import has_recipe, write_recipe
from lightning_ckptless.errors import TransportError
from lightning_ckptless.formats.packing import pack
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.protocol.mirror_interval import agreed
from lightning_ckptless.protocol.time_account import Bucket
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena import LEAST_SLOTS
from lightning_ckptless.replica.device_tier.device_space import free_bytes_of, require_fits
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import Described, from_message, to_message
from lightning_ckptless.replica.mirror.coordinated_stop import StopPurpose
from lightning_ckptless.replica.mirror.device_buffer import buffer_need, device_of
from lightning_ckptless.replica.mirror.mirror import Mirror
from lightning_ckptless.replica.mirror.mirror_settings import MirrorSettings
from lightning_ckptless.replica.mirror.round import Blob
from lightning_ckptless.replica.mirror.round_vote import RoundVote
from lightning_ckptless.replica.thread_count import threads_of_a_rank
from lightning_ckptless.trainer.audit.replica_audit import Audit
from lightning_ckptless.trainer.commit.device_versions import DeviceVersions, packed_once
from lightning_ckptless.trainer.commit.history_space import expected_growth, require_history_fits
from lightning_ckptless.trainer.commit.mirror_interval import MirrorInterval
from lightning_ckptless.trainer.commit.rank_state import RankState
from lightning_ckptless.trainer.commit.rereplication import Rereplication
from lightning_ckptless.trainer.commit.run_end import RunEnd
from lightning_ckptless.trainer.rewind.rewinding import Rewinding
from lightning_ckptless.trainer.session.session import Session
from lightning_ckptless.trainer.state.checkpoint_recipe import recipe_of
from lightning_ckptless.trainer.state.device_pickle import pack_late
from lightning_ckptless.trainer.state.layout_tensors import describe_state
from lightning_ckptless.trainer.state.static import StaticWatch
from lightning_ckptless.trainer.state.tensors import StateIndex, require_room

CLOSE_TIMEOUT_S = 10.0
MOST_GROWTH = 1.5
"""How much larger a state may become so that replicated tensors in which ranks differ are stored for each of them."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A layout and the tensors of this trainer that it describes.

    They are replaced together: a fault in between must not pair a new index with the previous layout.

    Args:
        layout: the layout.
        index: where the tensors are in the trainer.
    """

    layout: Layout
    index: StateIndex


class Mirroring:
    """Captures the versions of one trainer, over all generations that it takes part in.

    Args:
        session: session of this rank.
        rank_state: captures what a version contains besides tensors.
        end: ends the run with a version.
        rewinding: the rewinds that this rank asks for.
        audit: decides what follows if replicas differ.
        probe: called in the mirror thread with the moment of a round and its version.
        since: version that the run starts from; None if it starts from its beginning or joins a run in progress.

    Attributes:
        taken: the version that was captured or restored last.
        optimizers_are_of: the version whose state the optimizers hold; None while a step changes it.
        mirror_interval: how often a version is captured.
    """

    def __init__(
        self,
        session: Session,
        rank_state: RankState,
        end: RunEnd,
        rewinding: Rewinding,
        audit: Audit,
        probe: Callable[[str, Version], None],
        since: Version | None = None,
    ) -> None:
        self.taken = since
        self.optimizers_are_of: Version | None = None
        self.mirror_interval = MirrorInterval(session.options, session.report)
        self._session = session
        self._trainer = session.trainer
        self._options = session.options
        self._report = session.report
        self._rank_state = rank_state
        self._end = end
        self._rewinding = rewinding
        self._audit = audit
        self._probe = probe
        self._ends_here = False
        self._mirror: Mirror | None = None
        self._seen: Version | None = None
        self._planned: Planned | None = None
        self._rereplication: Rereplication | None = None
        self._static = StaticWatch()
        self._protected = since
        self._has_mirrored = since is not None
        self._device = None if session.device_tier is None else DeviceVersions(session, session.device_tier, probe)

    def every_n_steps(self) -> int:
        """Optimizer steps between two versions."""
        return self.mirror_interval.interval if self._device is None else 1

    def optimizers_hold(self, version: Version) -> bool:
        """Whether the optimizers still hold the state of a version, for the same parameters."""
        return self.optimizers_are_of == version and self._planned is not None and self._planned.index.is_current()

    def index_of(self, layout: Layout) -> StateIndex | None:
        """Where the trainer's tensors are, if they are known to match a layout."""
        known = self._planned
        if known is None or known.layout.digest != layout.digest or not known.index.is_current():
            return None
        return known.index

    @property
    def mirror(self) -> Mirror | None:
        """The mirror of this generation; None before its first version."""
        return self._mirror

    @property
    def plan(self) -> Planned | None:
        """The current plan; another object after each restoration and each change of the layout. None before both."""
        return self._planned

    @property
    def newest(self) -> Version | None:
        """The newest version that the ranks could restore now: committed in this generation, or restored from."""
        return self.committed or self._protected

    @property
    def committed(self) -> Version | None:
        """The newest version that this rank knows to be committed on all ranks."""
        return self._mirror.committed if self._mirror is not None else None

    @property
    def oldest(self) -> Version | None:
        """The oldest version that the ranks can go back to: without history, the newest committed one."""
        if self._mirror is None or not self._options.history:
            return self.committed
        return self._mirror.oldest

    # ------------------------------------------------------------------ generations

    def resume(
        self,
        version: Version,
        layout: Layout,
        index: StateIndex,
        protect: Callable[[], None] | None,
        protected: Version | None,
    ) -> None:
        """Resume from a restored version.

        Args:
            version: the version.
            layout: layout of its tensors.
            index: where its tensors are in this trainer.
            protect: makes the replicas that the protected version lacks, and all ranks call it together; None if there
                is none, or if the version is about to be mirrored again.
            protected: the newest version in the arenas, which is the same unless it comes from the device tier; None if
                they contain none.
        """
        planned = self._planned = Planned(layout, index)
        self.taken = self.optimizers_are_of = self._seen = version
        self._protected = protected
        steps_behind = version.optimizer_step - (-1 if protected is None else protected.optimizer_step)
        self._has_mirrored = protected is not None and steps_behind < self.mirror_interval.interval
        self._report_plan(planned, version)
        self._rereplication = None if protect is None else Rereplication(protect)
        if not has_recipe(self._session.arena.path):
            self._keep_recipe(planned)

    def _await_rereplication(self) -> None:
        """Wait until the restored version has all its replicas; newer versions are mirrored from here on."""
        rereplication, self._rereplication = self._rereplication, None
        if rereplication is not None:
            assert self._planned is not None
            self._report.waited(rereplication.wait())
            self._mirror = self._open(self._planned, committed=self._protected)

    def abandon(self) -> None:
        """Abandon work in progress: the generation is over, and its connections are aborted."""
        if self._rereplication is not None:
            self._rereplication.abandon(CLOSE_TIMEOUT_S)
            self._rereplication = None
        mirror, self._mirror = self._mirror, None
        if mirror is not None:
            mirror.close(CLOSE_TIMEOUT_S)
            # Only now: the last round may have found a difference.
            if mirror.in_doubt and self._session.device_tier is not None:
                self._session.device_tier.distrust()

    def settle(self) -> None:
        """Wait until the last version is committed."""
        with self._report.time.spending(Bucket.MIRROR_STALL):
            self._await_rereplication()
            if self._mirror is not None:
                self._mirror.settle()

    def close(self) -> None:
        """Release threads and mappings."""
        self.abandon()
        self._planned = None

    # ------------------------------------------------------------------ versions

    def ends_here(self) -> bool:
        """Called when a version may be captured; returns whether the run ends with it.

        Raises:
            GoBackError: all ranks go back to an earlier version instead.
            RewindError: they were to go back, and cannot.
            DivergenceError: replicas differ, and the run must end.
        """
        self.stop_if_due()
        self._ends_here = self._end.is_with(self._mirror)
        return self._ends_here

    def stop_if_due(self, *, at_end: bool = False) -> None:
        """Called by all ranks between two steps: go back, or act on replicas that differ, if they have agreed to.

        Args:
            at_end: whether no step follows.

        Raises:
            GoBackError: all ranks go back to an earlier version.
            RewindError: they were to go back, and cannot.
            DivergenceError: replicas differ, and the run must end.
        """
        planned, mirror = self._planned, self._mirror
        if planned is None or mirror is None:
            return
        verified = not self._audit.sends
        self._rewinding.stop_if_due(mirror, planned.index.read, at_end=at_end)
        if verified and self._audit.sends:
            # Tensors that differ are from now on in the shard of each rank.
            self._replan()

    def end_if_asked(self) -> None:
        """End the run after a batch if all ranks have agreed to.

        Raises:
            SIGTERMException: Lightning's own exception, at the point where Lightning raises it.
        """
        if self._trainer.world_size == 1 and self._end.is_asked() and self._is_between_steps():
            self.settle()
            self._end.agree()
        self._end.end_if_agreed()

    def _is_between_steps(self) -> bool:
        """Whether the last version includes all steps, and later batches will be part of the next one."""
        return self.taken == Version(self._trainer.global_step, True) and not FitLoops(self._trainer).step_done()

    def commit(self, version: Version) -> None:
        """Capture a version and hand it to the mirror. Called in the training thread at a commit point."""
        report = self._report
        with report.time.spending(Bucket.MIRROR_STALL):
            self._await_rereplication()
            report.step_done()
            self._capture(version)

    def _capture(self, version: Version) -> None:
        began = perf_counter()
        self._rank_state.warn_of_gaps()
        self.optimizers_are_of = version
        planned, mirror = self._planned, self._mirror
        if planned is None or mirror is None or not planned.index.is_current() or self._is_to_be_compared():
            planned, mirror = self._replan()
            self._report_plan(planned, version)
        self._seen = version
        if self._options.on_late == "skip" and mirror.busy and not self._ends_here:
            mirror.skip(version)
            self._report.taken(0.0, perf_counter() - began, mirror)
            return
        is_mirrored = self._is_to_be_mirrored(version)
        stall_s = self._submit(version, planned, mirror, is_mirrored=is_mirrored)
        self.taken = version
        spent_s = perf_counter() - began
        self._report.taken(stall_s, spent_s, mirror)
        if not is_mirrored:
            return
        self.mirror_interval.took(version, spent_s)
        agreement = mirror.interval_after
        if agreement is not None and agreement[0] < version:
            self.mirror_interval.settle(agreed(agreement[1]))
        if self._ends_here:
            self._stop(version, mirror)

    def _stop(self, version: Version, mirror: Mirror) -> None:
        """End the run, or leave the training loop because a rank is handed over. All ranks stop at the same version."""
        committed = mirror.settle()
        if mirror.stop.purpose is not StopPurpose.HAND_OVER:
            self._end.agree()
        elif committed == version:
            # A rank that exits while others still wait for its vote would cost them the version.
            self._session.members.transport.agree(True)
            self._end.hand_over(version.optimizer_step)

    def _is_to_be_mirrored(self, version: Version) -> bool:
        """Whether a version goes into the arenas; without a device tier, all do that are taken."""
        if self._device is None or self._ends_here or not self._has_mirrored:
            return True
        steps = FitLoops(self._trainer).batches_that_stepped + (not version.validation_done)
        return steps % self.mirror_interval.interval == 0

    def _submit(self, version: Version, planned: Planned, mirror: Mirror, *, is_mirrored: bool = True) -> float:
        tensors = planned.index.read()
        blob = self._blob(version, tensors)
        # Before the mirror thread is woken, which wants the interpreter lock as well.
        self._rank_state.forget_before(mirror.committed)
        if self._device is not None:
            blob = packed_once(blob)
            self._device.take(version, tensors, blob, mirror)
        if not is_mirrored:
            return 0.0
        stall_s = mirror.submit(version, tensors, blob, blocking_names=planned.index.private)
        if self._device is not None and not self._has_mirrored:
            # As long as the arenas contain no version, a loss may leave none at all.
            mirror.settle()
        self._has_mirrored = True
        return stall_s

    def _blob(self, version: Version, tensors: Mapping[str, Tensor]) -> Blob:
        blob = pack_late(self._rank_state.capture(version, tensors, self.mirror_interval.chosen))
        return self._session.outgoing.checked(blob)

    def take_again(self, version: Version) -> None:
        """Mirror a version that other ranks wrote, and wait until it is committed. All ranks call it together."""
        self.taken = self.optimizers_are_of = self._seen = version
        planned, mirror = self._replan()
        self._submit(version, planned, mirror)
        if mirror.settle() != version:
            raise TransportError(
                f"rank {self._trainer.global_rank}: {version} could not be mirrored by {self._trainer.world_size} "
                "ranks before training resumes: at least one rank did not have all of it"
            )

    def go_back(self, version: Version, newest: Version) -> None:
        """Mirror a restored version as the newest one, in place of all that followed it. All ranks call it together.

        Args:
            version: the restored version.
            newest: the newest version, which stays complete until this one is.
        """
        assert self._planned is not None
        planned, mirror = self._planned, self._open(self._planned, committed=newest)
        self._mirror = mirror
        tensors = planned.index.read()
        mirror.go_back(version, tensors, self._blob(version, tensors), blocking_names=planned.index.private)

    def wait_copied(self) -> None:
        """Wait until the current version has been copied, so that its tensors may change."""
        mirror = self._mirror
        if mirror is None or (mirror.is_staged and self._device is None):
            return
        with self._report.time.spending(Bucket.MIRROR_STALL):
            self._report.waited(mirror.wait_staged())
            if self._device is not None:
                self._report.waited(self._device.save())

    def before_optimizer_step(self) -> None:
        """Wait until the current version has been copied: the optimizer is about to change the tensors."""
        self.wait_copied()
        self.optimizers_are_of = None

    def _is_to_be_compared(self) -> bool:
        """Whether ranks may have just trained for the first time what was identical on all of them until then."""
        return self._seen is not None and self._seen.optimizer_step == 0 and not self._has_replicas()

    def _has_replicas(self) -> bool:
        """Whether ranks are known to have equal tensors: the strategy sees to it, and every version is compared."""
        are_compared = any(self._session.members.placement.holders) and self._options.verifies_replicas
        return self._trainer.strategy.replicates and (
            self._trainer.world_size == 1 or (are_compared and not self._audit.sends)
        )

    def _replan(self) -> tuple[Planned, Mirror]:
        if self._mirror is not None:
            self._mirror.settle()
        require_room(self._trainer)
        index = StateIndex(self._trainer)
        static = self._static.look(index)
        mine = to_message(describe_state(index, replicated=self._has_replicas(), static=static))
        lines = self._session.members.transport.gather(mine)
        # Usually all are equal, and each takes a while to parse.
        described = {line: from_message(line) for line in dict.fromkeys(lines)}
        layout = self._layout_of([described[line] for line in lines])
        planned = self._planned = Planned(layout, index)
        if self._seen is None:
            self._require_history_fits(layout)
        previous = self._mirror
        mirror = self._mirror = self._open(planned, committed=None if previous is None else previous.committed)
        if previous is not None:
            mirror.difference, mirror.in_doubt = previous.difference, previous.in_doubt
        if self._seen is None:
            self._require_fits_on_device(planned)
        self._keep_recipe(planned)
        return planned, mirror

    def _layout_of(self, described: Sequence[Sequence[Described]]) -> Layout:
        layout = plan_layout(described)
        if not self._trainer.strategy.replicates:
            return layout
        undigested = {id(of_rank): [replace(tensor, digest="") for tensor in of_rank] for of_rank in described}
        shared = plan_layout([undigested[id(of_rank)] for of_rank in described])
        # On different hardware nearly all tensors differ, and the copies of all ranks would need their multiple.
        return layout if _bytes_of(layout) <= MOST_GROWTH * _bytes_of(shared) else shared

    def _require_history_fits(self, layout: Layout) -> None:
        if not self._options.history:
            return
        growth, members = self._expected_growth(layout), self._session.members
        sizes = [layout.bulk_bytes(shard) for shard, _ in members.rings_of_node]
        require_history_fits(sizes, growth, self._options.history, members.arena.usable_bytes)

    def _require_fits_on_device(self, planned: Planned) -> None:
        layout, members, options = planned.layout, self._session.members, self._options
        needs = [] if self._device is None else [self._device.need()]
        if options.staging == "device":
            sources = members.placement.sources(members.rank) if options.verifies_replicas else ()
            needs.append(buffer_need(layout, members.rank, sources))
        if not needs:
            return
        held_bytes = sum(chunk.nbytes for chunk in layout.chunks if chunk.is_held_by(members.rank))
        free_bytes = free_bytes_of(device_of(planned.index.read().values()), len(members.ranks_of_node))
        growth = self._expected_growth(layout)
        require_fits(needs, held_bytes, layout.world_size, growth, free_bytes, members.rank)

    def _staging(self) -> str:
        """When the state is copied: in advance if something was found to write to tensors while they were copied."""
        is_overlapped = self._options.staging == "overlap"
        return "blocking" if is_overlapped and self._audit.stages_blocking else self._options.staging

    def _expected_growth(self, layout: Layout) -> float:
        return expected_growth(self._trainer.optimizers, _bytes_of(layout))

    def _report_plan(self, planned: Planned, version: Version) -> None:
        layout = planned.layout
        sizes_bytes = [layout.bulk_bytes(shard) for shard in range(layout.world_size)]
        self._report.planned(self._session.members, sizes_bytes, version, LEAST_SLOTS + self._options.history)

    def _keep_recipe(self, planned: Planned) -> None:
        """Store with the version what else a checkpoint file contains; it changes as rarely as the layout."""
        members = self._session.members
        if members.is_node_leader:
            recipe = recipe_of(self._trainer, planned.index.read(), self._rank_state.host_state.callbacks)
            write_recipe(members.arena.path, pack(recipe))

    def _open(self, planned: Planned, *, committed: Version | None) -> Mirror:
        members, layout = self._session.members, planned.layout
        if self._mirror is not None:
            self._mirror.close()
        if members.is_node_leader:
            members.arena.write_layout(layout)
        else:
            members.arena.remember_layout(layout)
        ranks, placement, options = members.ranks_of_node, members.placement, self._options
        slots = LEAST_SLOTS + options.history
        members.arena.require_space_for(members.rings_of_node, layout, count=slots)
        mirror = Mirror(
            arena=members.arena,
            layout=layout,
            placement=placement,
            transport=members.transport,
            generation=members.generation,
            settings=MirrorSettings(
                options.checksum,
                threads_of_a_rank(len(ranks), beside_training=True),
                self._staging(),
                slots,
                options.history_every,
                verifies=options.verifies_replicas and not self._audit.sends,
            ),
            committed=committed,
            probe=self._probe,
            vote=lambda complete: RoundVote(
                complete, self._end.purpose, self.mirror_interval.word(), not self._rewinding.is_asked
            ),
        )
        hooked = _written_by_hooks(planned)
        mirror.bind(hooked)
        if self._device is not None:
            self._device.open(layout, planned.index.read(), hooked)
        return mirror


def _bytes_of(layout: Layout) -> int:
    return sum(layout.bulk_bytes(shard) for shard in range(layout.world_size))


def _written_by_hooks(planned: Planned) -> frozenset[str]:
    """Parameters that a hook may write to before the optimizer steps; must not be copied while a batch runs."""
    return planned.index.untrained - {chunk.name for chunk in planned.layout.chunks if chunk.static}
