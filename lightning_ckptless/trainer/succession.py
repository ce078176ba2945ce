"""A version of another number of ranks, on its way into a trainer.

Small states are brought first: they say how many streams there are, and who takes over what follows from that
(`protocol.streams`). The tensors come when the trainer is set up, for what a rank holds of each is decided by the model
that it has built. Then the version is mirrored anew, cut for the ranks of now: until that is committed, the arenas keep
what the ranks before have written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.protocol.streams import Inheritance, inherit, require_world
from lightning_ckptless.protocol.versions import Complete
from lightning_ckptless.replica.description import held_by_name
from lightning_ckptless.replica.layout import Layout
from lightning_ckptless.replica.reshard import fill_resharded, plan_reads, shards_in
from lightning_ckptless.replica.restore import fetch
from lightning_ckptless.trainer.cohort import Cohort
from lightning_ckptless.trainer.host.metrics import defaults_of, metrics_of, reductions_of
from lightning_ckptless.trainer.mirroring import Mirroring
from lightning_ckptless.trainer.plain import unpack
from lightning_ckptless.trainer.report import RunReport
from lightning_ckptless.trainer.restoration import Restoration
from lightning_ckptless.trainer.rng import apply_rng
from lightning_ckptless.trainer.state import StateIndex
from lightning_ckptless.trainer.streams import Streams
from lightning_ckptless.trainer.sums import absorb, forget
from lightning_ckptless.trainer.tensors import describe_state, make_room

Small = dict[str, Any]


@dataclass(kw_only=True)
class Succession(Restoration):
    """A version of other ranks, with the small states that this rank takes over.

    Args:
        cohort: the ranks of now.
        heir: what this rank takes over.
        smalls: small states by the ranks that wrote them; that of `heir.home` has become this rank's own.
        reason: who goes on for whom, in a sentence.
    """

    cohort: Cohort
    heir: Inheritance
    smalls: dict[int, Small]
    reason: str

    def fill(self, trainer: Any, *, only_own: bool = False, index: StateIndex | None = None) -> None:
        """Put the tensors into the trainer, whatever is in them now. All ranks call it together.

        Raises:
            LayoutMismatchError: the model is another one, or cannot be divided over this number of ranks.
        """
        cohort, layout = self.cohort, self.layout
        self._add_up(trainer)
        make_room(trainer, layout.known_to(self.heir.home))
        self.index = StateIndex(trainer)
        described = describe_state(self.index)
        if lost := sorted(layout.known_to(self.heir.home).keys() - {d.name for d in described}):
            raise LayoutMismatchError(
                f"rank {cohort.rank}: the version has {', '.join(lost[:5])}, the model does not: start the script unchanged"
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
        self.smalls = {}

    def resume(self, mirroring: Mirroring, report: RunReport, cohort: Cohort) -> None:
        """Mirror the version as the ranks of now cut it, and go on from there. All ranks call it together."""
        assert self.index is not None
        report.resume(self.small["report"])
        mirroring.cadence.begin(self.small["interval"])
        apply_rng(self.state["rng"])
        mirroring.take_again(self.version)
        report.world_changed(self.complete.snapshot.world_size, self.reason)


def take_over(found: Complete, layout: Layout, cohort: Cohort, streams: Streams, obstacle: str | None) -> Succession:
    """Bring the small states here that this rank takes over. All ranks call it together.

    Args:
        found: the version.
        layout: how it is cut.
        cohort: the ranks of now.
        streams: of this rank; it is told how many there are.
        obstacle: why a rank cannot carry a stream beside its own; None where it can.

    Raises:
        WorldSizeError: this number of ranks cannot go on with the version.
    """
    before, world_size, width = found.snapshot.world_size, cohort.world_size, streams.width
    ranks = range(world_size)
    some = cohort.rank % before
    count = _smalls(found, cohort, {rank: (rank % before,) for rank in ranks})[some]["streams"]["count"]
    reason = require_world(world_size // width, before=before // width, streams=count, obstacle=obstacle)
    heirs = {rank: inherit(rank, world_size, before=before, streams=count, width=width) for rank in ranks}
    smalls = _smalls(found, cohort, {rank: heir.sources for rank, heir in heirs.items()})
    heir = heirs[cohort.rank]
    positions = {stream: _position(smalls[source], stream) for stream, source in heir.streams.items()}
    own, *others = heir.streams
    small = smalls[heir.home]
    small["state"] |= positions[own]
    if cohort.rank:
        # What stands in log files is rank 0's to say.
        small["state"]["logs"] = None
    small["streams"] = {"count": count, "own": own, "carried": {stream: positions[stream] for stream in others}}
    return Succession(found, layout, {}, small, cohort=cohort, heir=heir, smalls=smalls, reason=reason)


def _smalls(found: Complete, cohort: Cohort, wanted: Mapping[int, Collection[int]]) -> dict[int, Small]:
    fetched = fetch(found, cohort.arena, cohort.transport, cohort.nodes, need={}, blobs=wanted)
    return {rank: unpack(blob) for rank, blob in fetched.blobs.items()}


def _position(small: Small, stream: int) -> Small:
    """Generators and position of a stream, by the rank that carried it."""
    if stream == small["streams"]["own"]:
        return {"rng": small["state"]["rng"], "data": small["state"]["data"]}
    position: Small = small["streams"]["carried"][stream]
    return position
