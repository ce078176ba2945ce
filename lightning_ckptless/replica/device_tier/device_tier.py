"""The device tier of one rank, over all generations that its process takes part in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from lightning_ckptless.protocol.device_tier import DeviceState, Source
from lightning_ckptless.protocol.versions import Replica, Snapshot, Tier
from lightning_ckptless.replica.device_tier.delivery import HostPart, LiveVersion
from lightning_ckptless.replica.device_tier.device_plan import DevicePlan, DeviceSlots, counters
from lightning_ckptless.replica.transport import Transport, receive_buffer

log = logging.getLogger(__name__)

_SLOT_NUMBERS = {Source.SLOT: 0, Source.LIVE: 1}


@dataclass(frozen=True)
class _Saved:
    """A version in the slots.

    Args:
        snapshot: the version.
        rank: this rank.
        bulks: tensor state of each shard.
        parts: host part of each shard. Where there are slots, the early pieces are only here.
        slots: the slots; None if the version was fetched and is in host memory.
    """

    snapshot: Snapshot
    rank: int
    bulks: Mapping[int, torch.Tensor]
    parts: Mapping[int, HostPart]
    slots: DeviceSlots | None = None


class DeviceTier:
    """The version in the slots of this rank, and the one in its live tensors."""

    def __init__(self) -> None:
        self._saved: _Saved | None = None
        self._live: LiveVersion | None = None
        self._has_warned = False
        self._is_trusted = True

    @property
    def state(self) -> DeviceState:
        """The state of this rank's tier, as the protocol sees it."""
        live = self._live
        return DeviceState(
            None if self._saved is None else self._saved.snapshot,
            None if live is None or live.changed() is not None else live.snapshot,
            live is not None and live.is_known,
        )

    # ------------------------------------------------------------------ training

    def take(
        self,
        snapshot: Snapshot,
        plan: DevicePlan,
        tensors: Mapping[str, torch.Tensor],
        blob: bytes | Callable[[], bytes],
    ) -> LiveVersion:
        """Record that the live tensors contain a version, and copy its early pieces. Called at a commit point.

        Args:
            snapshot: the version.
            plan: what is kept of it.
            tensors: this rank's live tensors by name.
            blob: this rank's host state, or a function that returns it in the mirror thread.

        Returns:
            The version, to be delivered.
        """
        early = [plan.live_part(chunk, tensors).clone() for chunk in plan.own_early]
        ready = None
        if plan.device.type == "cuda":
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        self._live = LiveVersion(snapshot, plan, tensors, counters(plan.watched, tensors), early, blob, ready)
        return self._live

    def save(self) -> float:
        """Copy the live tensors into the slots, which may then change; does nothing if they have before.

        Returns:
            Seconds spent waiting for the vote.

        Raises:
            TransportError: a peer is lost. The live tensors must not change.
        """
        live = self._live
        if live is None:
            return 0.0
        began_at = perf_counter()
        live.known.wait()
        waited_s = perf_counter() - began_at
        if (name := live.changed()) is None:
            self._copy(live)
        else:
            self._warn(name, live)
        self._live = None
        return waited_s

    def _copy(self, live: LiveVersion) -> None:
        saved = self._saved
        slots = saved.slots if saved is not None else None
        if slots is None or not live.plan.is_same(slots.plan):
            slots = DeviceSlots(live.plan)
        slots.copy(live.tensors)
        self._saved = _Saved(live.snapshot, live.rank, slots.bulks, dict(live.parts), slots)

    def _warn(self, name: str, live: LiveVersion) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "ckptless: rank %d: %s changed between %s and the next optimizer step: the device tier cannot keep "
                "that version, and after a fault an older one is restored. Write to it in the optimizer step, or set "
                "device_tier='off'",
                live.plan.rank,
                name,
                live.snapshot.version,
            )

    # ------------------------------------------------------------------ restore

    def offer(self, transport: Transport, nodes: Sequence[str]) -> tuple[Replica, ...]:
        """The replicas that this rank offers; none on any rank if one of them knows of a difference.

        Args:
            transport: transport between all ranks.
            nodes: name of each rank's node.

        Raises:
            TransportError: a peer is lost.
        """
        if not transport.agree(self._is_trusted):
            self.drop()
        return self.inventory(transport.rank, transport.world_size, nodes[transport.rank])

    def inventory(self, rank: int, world_size: int, node: str) -> tuple[Replica, ...]:
        """The replicas that this rank offers; none, and nothing is kept, if its rank or the number of ranks changed.

        Args:
            rank: this rank.
            world_size: number of ranks.
            node: name of its node.
        """
        kept = [version for version in (self._saved, self._live) if version is not None]
        if any((version.rank, version.snapshot.world_size) != (rank, world_size) for version in kept):
            self.drop()
        return tuple(
            Replica(
                shard, rank, node, _SLOT_NUMBERS[source], s.version, s.generation, s.world_size, s.layout, state,
                bulk_bytes, len(part.blob), "", Tier.DEVICE,
            )
            for source, s, state in self.state.offers()
            for shard, (bulk_bytes, part) in self._offered(source).items()
        )  # fmt: skip

    def _offered(self, source: Source) -> dict[int, tuple[int, HostPart]]:
        """Size of the tensor state and host part of each shard."""
        live, saved = self._live, self._saved
        if source is Source.LIVE:
            assert live is not None
            # A copy: a mirror thread that was abandoned may still add to them.
            return {shard: (live.plan.layout.bulk_bytes(shard), part) for shard, part in dict(live.parts).items()}
        assert saved is not None
        return {shard: (saved.bulks[shard].numel(), part) for shard, part in saved.parts.items()}

    def settle(self, found: Snapshot) -> None:
        """Called when all ranks have chosen a version, before any live tensor is filled.

        Args:
            found: the version.
        """
        if self._live is not None and self.state.must_save_for(found):
            self._copy(self._live)
        self._live = None
        self._is_trusted = True

    def hold(self, found: Snapshot, rank: int, bulks: Mapping[int, torch.Tensor], blobs: Mapping[int, bytes]) -> None:
        """Keep a restored version until the next one is saved.

        Args:
            found: the version, for which `settle` was called.
            rank: this rank.
            bulks: tensor state of each shard that this rank keeps.
            blobs: host state of each of them.
        """
        saved = self._saved
        if saved is None or saved.snapshot != found or saved.parts.keys() != bulks.keys():
            parts = {shard: HostPart(blobs[shard], receive_buffer(0)) for shard in bulks}
            self._saved = _Saved(found, rank, {shard: bulk.clone() for shard, bulk in bulks.items()}, parts)

    def distrust(self) -> None:
        """Forget all versions, and trust no rank's until another one is restored.

        The mirror has compared replicas of an older version, and they differ.
        """
        self.drop()
        self._is_trusted = False

    def drop(self) -> None:
        """Forget all versions."""
        self._saved = self._live = None

    def read_bulk(self, replica: Replica) -> torch.Tensor:
        """The tensor state of a replica of this rank, in host memory: uint8 of shape [bulk bytes]."""
        saved = self._saved
        assert saved is not None and saved.snapshot == replica.snapshot, f"{replica} is not in the slots"
        bulk = saved.bulks[replica.shard].to("cpu", copy=True)
        if saved.slots is not None:
            at, early = 0, saved.parts[replica.shard].early
            for chunk in saved.slots.plan.early(replica.shard):
                bulk[chunk.at : chunk.at + chunk.nbytes] = early[at : at + chunk.nbytes]
                at += chunk.nbytes
        return bulk

    def read_blob(self, replica: Replica) -> bytes:
        """The host state of a replica of this rank."""
        saved = self._saved
        assert saved is not None and saved.snapshot == replica.snapshot, f"{replica} is not in the slots"
        return saved.parts[replica.shard].blob
