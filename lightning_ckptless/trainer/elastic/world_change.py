"""A version of another number of ranks, on its way into a trainer.

Small states are brought first: they say how many streams there are, and who takes over what follows from that
(`protocol.streams`). The tensors come when the trainer is set up, for what a rank holds of each is decided by the model
that it has built. Then the version is mirrored anew, cut for the ranks of now: until that is committed, the arenas keep
what the ranks before have written.
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
from lightning_ckptless.internals.mesh_internals import divide_anew, make_room_for_part, uneven_parameters
from lightning_ckptless.options import ElasticBatch
from lightning_ckptless.protocol.repartition import Repartition, require_repartition
from lightning_ckptless.protocol.versions import Complete
from lightning_ckptless.protocol.virtual_ranks import RankAssignment, inherit, require_world
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.layout.reshard import fill_resharded, plan_reads, shards_in
from lightning_ckptless.replica.layout.tensor_spec import held_by_name
from lightning_ckptless.replica.restore import fetch
from lightning_ckptless.trainer.commit.mirroring import Mirroring
from lightning_ckptless.trainer.data.position import at_the_beginning
from lightning_ckptless.trainer.recovery.restoration import Restoration
from lightning_ckptless.trainer.reporting.report import RunReport
from lightning_ckptless.trainer.session.member_set import MemberSet
from lightning_ckptless.trainer.state.layout_tensors import describe_state, make_room
from lightning_ckptless.trainer.state.metric_merging import absorb, forget, reopen
from lightning_ckptless.trainer.state.rng import apply_rng
from lightning_ckptless.trainer.state.sharding import reshard
from lightning_ckptless.trainer.state.tensors import StateIndex
from lightning_ckptless.trainer.state.trust import host_state_of

Small = dict[str, Any]


@dataclass(kw_only=True)
class WorldChange(Restoration):
    """A version of other ranks, with the small states that this rank takes over.

    Args:
        members: the ranks of now.
        assignee: what this rank takes over.
        host_states: small states by the ranks that wrote them; that of `assignee.home` has become this rank's own.
        reason: who goes on for whom, in a sentence.
        change: micro-batches of a step, before and now; None where they stay as many.
    """

    members: MemberSet
    assignee: RankAssignment
    host_states: dict[int, Small]
    reason: str
    change: tuple[int, int] | None = None

    def fill(self, trainer: Any, **_: Any) -> None:
        """Put the tensors into the trainer, whatever is in them now. All ranks call it together.

        Raises:
            LayoutMismatchError: the model is another one, or cannot be divided over this number of ranks.
        """
        members, layout = self.members, self.layout
        self._add_up(trainer)
        known = layout.known_to(self.assignee.home)
        make_room(trainer, known)
        self.index = StateIndex(trainer)
        described = describe_state(self.index)
        if lost := sorted(known.keys() - {d.name for d in described}):
            raise LayoutMismatchError(
                f"rank {members.rank}: the version has {', '.join(lost[:5])}, the model does not: start the script "
                "unchanged"
            )
        reads = plan_reads(layout, held_by_name(described), home=self.assignee.home)
        need = dict(enumerate(members.gather(list(shards_in(reads)))))
        fetched = fetch(self.complete, members.arena, members.transport, members.nodes, need=need, blobs={})
        fill_resharded(reads, fetched.bulks, self.index.read())

    def _add_up(self, trainer: Any) -> None:
        """Take on the running sums of ranks that are gone; begin with none where this rank is new."""
        metrics = metrics_of(trainer.lightning_module.named_modules())
        if self.assignee.home not in self.assignee.sums:
            forget(self.state, {name: defaults_of(metric) for name, metric in metrics.items()})
        reductions = {name: reductions_of(metric) for name, metric in metrics.items()}
        for rank in self.assignee.sums:
            if rank != self.assignee.home:
                absorb(self.state, self.host_states[rank]["state"], reductions)
        reopen(self.state)
        self.host_states = {}

    def resume(self, mirroring: Mirroring, report: RunReport, _: MemberSet) -> None:
        """Mirror the version as the ranks of now cut it, and go on from there. All ranks call it together."""
        assert self.index is not None
        report.resume(self.host_state["report"])
        mirroring.cadence.begin(self.host_state["interval"])
        apply_rng(self.state["rng"])
        if self.change is not None:
            tell_of_batch(mirroring.trainer, *self.change)
        mirroring.take_again(self.version)
        report.world_changed(self.complete.snapshot.world_size, self.reason)


def take_over(
    found: Complete, layout: Layout, members: MemberSet, width: int, batch: ElasticBatch, obstacle: str | None
) -> WorldChange:
    """Bring the small states here that this rank takes over. All ranks call it together.

    Args:
        found: the version.
        layout: how it is cut.
        members: the ranks of now.
        width: ranks that share a stream.
        batch: what a step of another number of ranks is made of.
        obstacle: why a rank cannot carry a stream beside its own; None where it can.

    Raises:
        WorldSizeError: this number of ranks cannot go on with the version.
    """
    before, world_size = found.snapshot.world_size, members.world_size
    some = {rank: (rank % before,) for rank in range(world_size)}
    streams = _host_states(found, members, some)[members.rank % before]["streams"]
    if batch == "scale" or streams["repartition"] is not None:
        return _take_over_dealt(found, layout, members, width)
    count = streams["count"]
    reason = require_world(world_size // width, before=before // width, streams=count, obstacle=obstacle)
    assignee, host_states = _inherited(found, members, count, width)
    host_state, (own, *others) = host_states[assignee.home], assignee.streams
    positions = {stream: _position(host_states[source], stream) for stream, source in assignee.streams.items()}
    host_state["state"] |= positions[own]
    host_state["streams"] |= {"own": own, "carried": {stream: positions[stream] for stream in others}}
    return WorldChange(
        found, layout, {}, host_state, members=members, assignee=assignee, host_states=host_states, reason=reason
    )


def _take_over_dealt(found: Complete, layout: Layout, members: MemberSet, width: int) -> WorldChange:
    """Repartition the rest of the epoch to the ranks that there are."""
    assignee, host_states = _inherited(found, members, None, width)
    host_state = host_states[assignee.home]
    streams, data = host_state["streams"], host_state["state"]["data"]
    done = data["fetched"] - data["buffered"]
    last = None if streams["repartition"] is None else Repartition(**streams["repartition"])
    begin = streams["count"] * done if last is None else last.after(done)
    repartition = Repartition(streams["count"], streams["length"], begin, members.world_size // width)
    per_step = streams["count"] if last is None else last.world_size
    reason = require_repartition(repartition, before=found.snapshot.world_size // width, per_step=per_step)
    host_state["streams"] |= {"own": members.rank // width, "carried": {}, "repartition": asdict(repartition)}
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


def _inherited(
    found: Complete, members: MemberSet, streams: int | None, width: int
) -> tuple[RankAssignment, dict[int, Small]]:
    """What this rank takes over, and the small states that takes. All ranks call it together."""
    before, world_size = found.snapshot.world_size, members.world_size
    assignees = [inherit(rank, world_size, before=before, streams=streams, width=width) for rank in range(world_size)]
    host_states = _host_states(found, members, {rank: assignee.sources for rank, assignee in enumerate(assignees)})
    assignee = assignees[members.rank]
    if members.rank:
        # What is logged is rank 0's to say.
        host_states[assignee.home]["logs"] = None
    return assignee, host_states


def _host_states(found: Complete, members: MemberSet, wanted: Mapping[int, Collection[int]]) -> dict[int, Small]:
    fetched = fetch(found, members.arena, members.transport, members.nodes, need={}, blobs=wanted)
    return {rank: host_state_of(rank, fetched, members) for rank in fetched.blobs}


def _position(host_state: Small, stream: int) -> Small:
    """Generators and position of a stream, by the rank that carried it."""
    if stream == host_state["streams"]["own"]:
        return {"rng": host_state["state"]["rng"], "data": host_state["state"]["data"]}
    position: Small = host_state["streams"]["carried"][stream]
    return position


def divide_state_anew(trainer: Any, modules: Sequence[Any], mesh: DeviceMesh) -> None:
    """Make room for this rank's part of every sharded tensor of the state.

    Args:
        trainer: set up.
        modules: those of its model under `fully_shard`.
        mesh: that of the strategy, which has become the new world's.

    Raises:
        LayoutMismatchError: a tensor cannot be divided over the ranks that there are.
    """
    for name, sizes, dim, ranks in uneven_parameters(modules):
        raise LayoutMismatchError(
            f"rank {trainer.global_rank}: {name} is {sizes}, sharded along its dimension {dim}: {ranks} ranks cannot "
            "divide that evenly, as fully_shard wants it. Allow only numbers of nodes that can (--nnodes MIN:MAX), or "
            "shard along dimension 0"
        )
    reshard(modules)
    divided = set(map(id, divide_anew(modules)))
    for tensor in StateIndex(trainer).tensors().values():
        if isinstance(tensor, DTensor) and id(tensor) not in divided:
            make_room_for_part(tensor, mesh)
