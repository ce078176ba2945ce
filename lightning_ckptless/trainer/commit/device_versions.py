"""Every version goes into the device tier; those of the mirror interval go into the arenas as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from lightning_ckptless.protocol.device_tier import slot_bytes
from lightning_ckptless.protocol.placement import Placement
from lightning_ckptless.protocol.versions import Snapshot, Version
from lightning_ckptless.replica.device_tier.delivery import Delivery
from lightning_ckptless.replica.device_tier.device_plan import DevicePlan
from lightning_ckptless.replica.device_tier.device_space import DeviceNeed
from lightning_ckptless.replica.device_tier.device_tier import DeviceTier
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.mirror.device_buffer import device_of
from lightning_ckptless.replica.mirror.mirror import Mirror
from lightning_ckptless.replica.mirror.round import Blob
from lightning_ckptless.trainer.session.session import Session


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a generation keeps on devices.

    Args:
        plan: shards of this rank.
        placement: placement of the device tier.
        generation: number of the generation.
    """

    plan: DevicePlan
    placement: Placement
    generation: int


class DeviceVersions:
    """Takes the versions of one trainer into the device tier.

    Args:
        session: session of this rank.
        tier: device tier of this rank.
        probe: called in the mirror thread with `known` and a version that all ranks have voted for.
    """

    def __init__(self, session: Session, tier: DeviceTier, probe: Callable[[str, Version], None]) -> None:
        self._session = session
        self._tier = tier
        self._probe = probe
        self._opened: _Opened | None = None

    def open(self, layout: Layout, tensors: Mapping[str, Tensor], hooked: frozenset[str]) -> None:
        """Plan what is kept from now on. Slots are reused if they fit.

        Args:
            layout: layout of the state.
            tensors: this rank's live tensors by name.
            hooked: names of the parameters that a hook may write to before the optimizer steps.
        """
        members = self._session.members
        placement = self._session.device_placement
        device = device_of(tensors.values())
        shards = (members.rank, *placement.sources(members.rank))
        elsewhere = frozenset(name for name, tensor in tensors.items() if tensor.device != device)
        plan = DevicePlan(layout, members.rank, shards, hooked, elsewhere, device)
        self._opened = _Opened(plan, placement, members.generation)

    def need(self) -> DeviceNeed:
        """The device memory of the slots."""
        assert self._opened is not None
        plan = self._opened.plan
        sizes = [plan.layout.bulk_bytes(shard) for shard in range(plan.layout.world_size)]
        used_bytes = slot_bytes(self._opened.placement, plan.rank, sizes)
        return DeviceNeed("device_tier='on'", "device_tier='off'", "the slots", used_bytes, len(plan.shards))

    def take(self, version: Version, tensors: Mapping[str, Tensor], blob: Blob, mirror: Mirror) -> None:
        """Take a version that now exists; the mirror's thread delivers it, before later rounds.

        Args:
            version: the version.
            tensors: this rank's live tensors by name.
            blob: this rank's host state.
            mirror: mirror of this generation.
        """
        assert self._opened is not None, "a mirror is opened before the first version"
        plan, members = self._opened.plan, self._session.members
        snapshot = Snapshot(version, self._opened.generation, plan.layout.world_size, plan.layout.digest)
        live = self._tier.take(snapshot, plan, tensors, blob)
        holders = self._opened.placement.holders[plan.rank]
        mirror.then(Delivery(live, members.transport, holders, lambda: self._probe("known", version)))

    def save(self) -> float:
        """Copy the version that was taken last into device memory: its tensors are about to change.

        Returns:
            Seconds spent waiting until it is known to all ranks.

        Raises:
            TransportError: a peer is lost.
        """
        return self._tier.save()


def packed_once(blob: Blob) -> Blob:
    """Host state that two rounds send, serialized at the first of them."""
    packed: Callable[[], bytes] | bytes = blob if isinstance(blob, bytes) else cache(blob)
    return packed
