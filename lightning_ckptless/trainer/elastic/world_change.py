"""Restores a version that was written by a different number of ranks.

Host states are fetched first: they contain the number of virtual ranks, from which each rank's assignment follows
(`protocol.virtual_ranks`). The tensors follow once the trainer is set up, since its model determines which part of each
tensor a rank holds. Then the version is mirrored again with a layout for the current ranks. Until that is committed,
the arenas keep what the earlier ranks wrote.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.internals.lightning.metrics import defaults_of, metrics_of, reductions_of
from lightning_ckptless.internals.lightning.virtual_ranks import tell_of_batch
from lightning_ckptless.internals.mesh_internals import make_room_for_part, reshard_in_place, uneven_parameters
from lightning_ckptless.options import ElasticBatch
from lightning_ckptless.protocol.repartition import Repartition, require_repartition
from lightning_ckptless.protocol.versions import Complete
from lightning_ckptless.protocol.virtual_ranks import RankAssignment, assign, require_world
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.layout.reshard import fill_resharded, plan_reads, shards_in
from lightning_ckptless.replica.layout.tensor_spec import held_by_name
from lightning_ckptless.replica.restore import fetch
from lightning_ckptless.trainer.commit.mirroring import Mirroring
from lightning_ckptless.trainer.data.position import at_the_beginning
from lightning_ckptless.trainer.recovery.restoration import Restoration
from lightning_ckptless.trainer.session.member_set import MemberSet
from lightning_ckptless.trainer.session.session import Session
from lightning_ckptless.trainer.state.layout_tensors import describe_state, make_room
from lightning_ckptless.trainer.state.metric_merging import HostStateDict, clear, discard_computed, merge
from lightning_ckptless.trainer.state.rng import apply_rng
from lightning_ckptless.trainer.state.sharding import reshard
from lightning_ckptless.trainer.state.tensors import StateIndex
from lightning_ckptless.trainer.state.trust import host_state_of


@dataclass(kw_only=True)
class WorldChange(Restoration):
    """A version written by a different set of ranks, with the host states that this rank takes over.

    Args:
        members: the current ranks.
        assignee: what this rank takes over.
        host_states: host states by the rank that wrote them; this rank's own is based on that of `assignee.home`.
        reason: the change of world size, as a sentence.
        change: micro-batches per step before and now; None if unchanged.
    """

    members: MemberSet
    assignee: RankAssignment
    host_states: dict[int, HostStateDict]
    reason: str
    change: tuple[int, int] | None = None

    def fill(self, trainer: Any, **_: Any) -> None:
        """Copy the version's tensors into the trainer. Collective.

        Raises:
            LayoutMismatchError: the model is a different one, or cannot be sharded over this number of ranks.
        """
        members, layout = self.members, self.layout
        self._merge_metrics(trainer)
        known = layout.known_to(self.assignee.home)
        make_room(trainer, known)
        self.index = StateIndex(trainer)
        described = describe_state(self.index)
        if lost := sorted(known.keys() - {d.name for d in described}):
            raise LayoutMismatchError(
                f"rank {members.rank}: the version has {', '.join(lost[:5])}, but the model does not: start the script "
                "unchanged"
            )
        reads = plan_reads(layout, held_by_name(described), home=self.assignee.home)
        need = dict(enumerate(members.gather(list(shards_in(reads)))))
        fetched = fetch(self.complete, members.arena, members.transport, members.nodes, need=need, blobs={})
        fill_resharded(reads, fetched.bulks, self.index.read())

    def _merge_metrics(self, trainer: Any) -> None:
        """Merge the metrics and logged values of lost ranks into this rank's; an added rank starts empty."""
        metrics = metrics_of(trainer.lightning_module.named_modules())
        if self.assignee.home not in self.assignee.sums:
            clear(self.state, {name: defaults_of(metric) for name, metric in metrics.items()})
        reductions = {name: reductions_of(metric) for name, metric in metrics.items()}
        for rank in self.assignee.sums:
            if rank != self.assignee.home:
                merge(self.state, self.host_states[rank]["state"], reductions)
        discard_computed(self.state)
        self.host_states = {}

    def resume(self, session: Session, mirroring: Mirroring) -> None:
        """Mirror the version again with a layout for the current ranks, and continue from it. Collective."""
        assert self.index is not None
        session.report.resume(self.host_state["report"])
        mirroring.mirror_interval.begin(self.host_state["interval"])
        apply_rng(self.state["rng"])
        if self.change is not None:
            tell_of_batch(session.trainer, *self.change)
        mirroring.take_again(self.version)
        session.report.world_changed(self.complete.snapshot.world_size, self.reason)


def take_over(
    found: Complete, layout: Layout, members: MemberSet, width: int, batch: ElasticBatch, obstacle: str | None
) -> WorldChange:
    """Fetch the host states that this rank takes over. Collective.

    Args:
        found: the version.
        layout: its layout.
        members: the current ranks.
        width: number of ranks that share a virtual rank.
        batch: how the batch of a step changes with the number of ranks.
        obstacle: why a rank cannot run more than one virtual rank; None if it can.

    Raises:
        WorldSizeError: this number of ranks cannot continue from the version.
    """
    before, world_size = found.snapshot.world_size, members.world_size
    any_source = {rank: (rank % before,) for rank in range(world_size)}
    saved = _host_states(found, members, any_source)[members.rank % before]["virtual_ranks"]
    if batch == "scale" or saved["repartition"] is not None:
        return _take_over_repartitioned(found, layout, members, width)
    count = saved["count"]
    reason = require_world(world_size // width, before=before // width, virtual_ranks=count, obstacle=obstacle)
    assignee, host_states = _assigned(found, members, count, width)
    host_state, (own, *others) = host_states[assignee.home], assignee.virtual_ranks
    positions = {number: _position(host_states[source], number) for number, source in assignee.virtual_ranks.items()}
    host_state["state"] |= positions[own]
    host_state["virtual_ranks"] |= {"own": own, "carried": {number: positions[number] for number in others}}
    return WorldChange(
        found, layout, {}, host_state, members=members, assignee=assignee, host_states=host_states, reason=reason
    )


def _take_over_repartitioned(found: Complete, layout: Layout, members: MemberSet, width: int) -> WorldChange:
    """Repartition the rest of the epoch over the current ranks."""
    assignee, host_states = _assigned(found, members, None, width)
    host_state = host_states[assignee.home]
    saved, data = host_state["virtual_ranks"], host_state["state"]["data"]
    done = data["fetched"] - data["buffered"]
    last = None if saved["repartition"] is None else Repartition(**saved["repartition"])
    begin = saved["count"] * done if last is None else last.after(done)
    repartition = Repartition(saved["count"], saved["length"], begin, members.world_size // width)
    per_step = saved["count"] if last is None else last.world_size
    reason = require_repartition(repartition, before=found.snapshot.world_size // width, per_step=per_step)
    host_state["virtual_ranks"] |= {"own": members.rank // width, "carried": {}, "repartition": asdict(repartition)}
    host_state["state"]["data"] = at_the_beginning(data)
    change = (per_step, repartition.world_size)
    return WorldChange(
        found,
        layout,
        {},
        host_state,
        members=members,
        assignee=assignee,
        host_states=host_states,
        reason=reason,
        change=change,
    )


def _assigned(
    found: Complete, members: MemberSet, count: int | None, width: int
) -> tuple[RankAssignment, dict[int, HostStateDict]]:
    """Return what this rank takes over, with the host states for it. Collective."""
    before, world_size = found.snapshot.world_size, members.world_size
    assignees = [
        assign(rank, world_size, before=before, virtual_ranks=count, width=width) for rank in range(world_size)
    ]
    host_states = _host_states(found, members, {rank: assignee.sources for rank, assignee in enumerate(assignees)})
    assignee = assignees[members.rank]
    if members.rank:
        # Only rank 0 owns the state of the loggers.
        host_states[assignee.home]["logs"] = None
    return assignee, host_states


def _host_states(
    found: Complete, members: MemberSet, wanted: Mapping[int, Collection[int]]
) -> dict[int, HostStateDict]:
    fetched = fetch(found, members.arena, members.transport, members.nodes, need={}, blobs=wanted)
    return {rank: host_state_of(rank, fetched, members) for rank in fetched.blobs}


def _position(host_state: HostStateDict, virtual_rank: int) -> HostStateDict:
    """Return the generators and data position of a virtual rank from the host state of the rank that ran it."""
    if virtual_rank == host_state["virtual_ranks"]["own"]:
        return {"rng": host_state["state"]["rng"], "data": host_state["state"]["data"]}
    position: HostStateDict = host_state["virtual_ranks"]["carried"][virtual_rank]
    return position


def resize_sharded_state(trainer: Any, modules: Sequence[Any], mesh: DeviceMesh) -> None:
    """Resize every sharded tensor of the state to this rank's new local part. The values are undefined afterwards.

    Args:
        trainer: set up.
        modules: the modules of its model under `fully_shard`.
        mesh: the strategy's device mesh, already that of the new world.

    Raises:
        LayoutMismatchError: a tensor cannot be sharded evenly over the current ranks.
    """
    for name, sizes, dim, ranks in uneven_parameters(modules):
        raise LayoutMismatchError(
            f"rank {trainer.global_rank}: {name} is {sizes}, sharded along dimension {dim}, which does not divide "
            f"evenly over {ranks} ranks, as fully_shard requires. Allow only node counts that divide it "
            "(--nnodes MIN:MAX), or shard along dimension 0"
        )
    reshard(modules)
    divided = set(map(id, reshard_in_place(modules)))
    for tensor in StateIndex(trainer).tensors().values():
        if isinstance(tensor, DTensor) and id(tensor) not in divided:
            make_room_for_part(tensor, mesh)
