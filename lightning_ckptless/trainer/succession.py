"""A version of another number of ranks, on its way into a trainer.

Small states are brought first: they say how many streams there are, and who takes over what follows from that
(`protocol.streams`). The tensors come when the trainer is set up, for what a rank holds of each is decided by the model
that it has built. Then the version is mirrored anew, cut for the ranks of now: until that is committed, the arenas keep
what the ranks before have written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.options import ElasticBatch
from lightning_ckptless.protocol.dealing import Deal, require_deal
from lightning_ckptless.protocol.streams import Inheritance, inherit, require_world
from lightning_ckptless.protocol.versions import Complete
from lightning_ckptless.replica.description import held_by_name
from lightning_ckptless.replica.layout import Layout
from lightning_ckptless.replica.reshard import fill_resharded, plan_reads, shards_in
from lightning_ckptless.replica.restore import fetch
from lightning_ckptless.trainer.cohort import Cohort
from lightning_ckptless.trainer.data import at_the_beginning
from lightning_ckptless.trainer.host.metrics import defaults_of, metrics_of, reductions_of
from lightning_ckptless.trainer.host.streams import tell_of_batch
from lightning_ckptless.trainer.mirroring import Mirroring
from lightning_ckptless.trainer.report import RunReport
from lightning_ckptless.trainer.restoration import Restoration
from lightning_ckptless.trainer.rng import apply_rng
from lightning_ckptless.trainer.state import StateIndex
from lightning_ckptless.trainer.sums import absorb, forget, reopen
from lightning_ckptless.trainer.tensors import describe_state, make_room
from lightning_ckptless.trainer.trust import small_state_of

Small = dict[str, Any]


@dataclass(kw_only=True)
class Succession(Restoration):
    """A version of other ranks, with the small states that this rank takes over.

    Args:
        cohort: the ranks of now.
        heir: what this rank takes over.
        smalls: small states by the ranks that wrote them; that of `heir.home` has become this rank's own.
        reason: who goes on for whom, in a sentence.
        change: micro-batches of a step, before and now; None where they stay as many.
    """

    cohort: Cohort
    heir: Inheritance
    smalls: dict[int, Small]
    reason: str
    change: tuple[int, int] | None = None

    def fill(self, trainer: Any, **_: Any) -> None:
        """Put the tensors into the trainer, whatever is in them now. All ranks call it together.

        Raises:
            LayoutMismatchError: the model is another one, or cannot be divided over this number of ranks.
        """
        cohort, layout = self.cohort, self.layout
        self._add_up(trainer)
        known = layout.known_to(self.heir.home)
        make_room(trainer, known)
        self.index = StateIndex(trainer)
        described = describe_state(self.index)
        if lost := sorted(known.keys() - {d.name for d in described}):
            raise LayoutMismatchError(
                f"rank {cohort.rank}: the version has {', '.join(lost[:5])}, the model does not: start the script "
                "unchanged"
            )
        reads = plan_reads(layout, held_by_name(described), home=self.heir.home)
        need = dict(enumerate(cohort.gather(list(shards_in(reads)))))
        fetched = fetch(self.complete, cohort.arena, cohort.transport, cohort.nodes, need=need, blobs={})
        fill_resharded(reads, fetched.bulks, self.index.read())

    def _add_up(self, trainer: Any) -> None:
        """Take on the running sums of ranks that are gone; begin with none where this rank is new."""
        metrics = metrics_of(trainer.lightning_module.named_modules())
        if self.heir.home not in self.heir.sums:
            forget(self.state, {name: defaults_of(metric) for name, metric in metrics.items()})
        reductions = {name: reductions_of(metric) for name, metric in metrics.items()}
        for rank in self.heir.sums:
            if rank != self.heir.home:
                absorb(self.state, self.smalls[rank]["state"], reductions)
        reopen(self.state)
        self.smalls = {}

    def resume(self, mirroring: Mirroring, report: RunReport, _: Cohort) -> None:
        """Mirror the version as the ranks of now cut it, and go on from there. All ranks call it together."""
        assert self.index is not None
        report.resume(self.small["report"])
        mirroring.cadence.begin(self.small["interval"])
        apply_rng(self.state["rng"])
        if self.change is not None:
            tell_of_batch(mirroring.trainer, *self.change)
        mirroring.take_again(self.version)
        report.world_changed(self.complete.snapshot.world_size, self.reason)


def take_over(
    found: Complete, layout: Layout, cohort: Cohort, width: int, batch: ElasticBatch, obstacle: str | None
) -> Succession:
    """Bring the small states here that this rank takes over. All ranks call it together.

    Args:
        found: the version.
        layout: how it is cut.
        cohort: the ranks of now.
        width: ranks that share a stream.
        batch: what a step of another number of ranks is made of.
        obstacle: why a rank cannot carry a stream beside its own; None where it can.

    Raises:
        WorldSizeError: this number of ranks cannot go on with the version.
    """
    before, world_size = found.snapshot.world_size, cohort.world_size
    some = {rank: (rank % before,) for rank in range(world_size)}
    streams = _smalls(found, cohort, some)[cohort.rank % before]["streams"]
    if batch == "scale" or streams["deal"] is not None:
        return _take_over_dealt(found, layout, cohort, width)
    count = streams["count"]
    reason = require_world(world_size // width, before=before // width, streams=count, obstacle=obstacle)
    heir, smalls = _inherited(found, cohort, count, width)
    small, (own, *others) = smalls[heir.home], heir.streams
    positions = {stream: _position(smalls[source], stream) for stream, source in heir.streams.items()}
    small["state"] |= positions[own]
    small["streams"] |= {"own": own, "carried": {stream: positions[stream] for stream in others}}
    return Succession(found, layout, {}, small, cohort=cohort, heir=heir, smalls=smalls, reason=reason)


def _take_over_dealt(found: Complete, layout: Layout, cohort: Cohort, width: int) -> Succession:
    """Deal the rest of the epoch to the ranks that there are."""
    heir, smalls = _inherited(found, cohort, None, width)
    small = smalls[heir.home]
    streams, data = small["streams"], small["state"]["data"]
    done = data["fetched"] - data["buffered"]
    last = None if streams["deal"] is None else Deal(**streams["deal"])
    begin = streams["count"] * done if last is None else last.after(done)
    deal = Deal(streams["count"], streams["length"], begin, cohort.world_size // width)
    per_step = streams["count"] if last is None else last.world_size
    reason = require_deal(deal, before=found.snapshot.world_size // width, per_step=per_step)
    small["streams"] |= {"own": cohort.rank // width, "carried": {}, "deal": asdict(deal)}
    small["state"]["data"] = at_the_beginning(data)
    change = (per_step, deal.world_size)
    return Succession(found, layout, {}, small, cohort=cohort, heir=heir, smalls=smalls, reason=reason, change=change)


def _inherited(
    found: Complete, cohort: Cohort, streams: int | None, width: int
) -> tuple[Inheritance, dict[int, Small]]:
    """What this rank takes over, and the small states that takes. All ranks call it together."""
    before, world_size = found.snapshot.world_size, cohort.world_size
    heirs = [inherit(rank, world_size, before=before, streams=streams, width=width) for rank in range(world_size)]
    smalls = _smalls(found, cohort, {rank: heir.sources for rank, heir in enumerate(heirs)})
    heir = heirs[cohort.rank]
    if cohort.rank:
        # What is logged is rank 0's to say.
        smalls[heir.home]["logs"] = None
    return heir, smalls


def _smalls(found: Complete, cohort: Cohort, wanted: Mapping[int, Collection[int]]) -> dict[int, Small]:
    fetched = fetch(found, cohort.arena, cohort.transport, cohort.nodes, need={}, blobs=wanted)
    return {rank: small_state_of(rank, fetched, cohort) for rank in fetched.blobs}


def _position(small: Small, stream: int) -> Small:
    """Generators and position of a stream, by the rank that carried it."""
    if stream == small["streams"]["own"]:
        return {"rng": small["state"]["rng"], "data": small["state"]["data"]}
    position: Small = small["streams"]["carried"][stream]
    return position
