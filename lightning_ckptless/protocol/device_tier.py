"""The device tier: one version in the memory of the ranks' devices, newer than the newest one in the arenas.

Each rank has one *slot* per shard that it writes or holds, in device memory. Version k is what the *live* tensors of
every rank contain between step k and step k+1. Ranks are replicas of each other, so a rank fills its slots from its own
live tensors, and only the host state of k travels, with two votes: a rank casts the first once its device has ended
step k, and the second once it knows the outcome of the first and has the host states of its own shard and of those that
it holds. A rank that learns that all have cast the second *knows* k.

**The rule.** A slot is overwritten with k only by a rank that knows k. Nothing changes the live tensors before they are
saved: a rank makes step k+1 only after it has saved k. The copy is queued directly before the step, on the same stream.

**Why it suffices.** Let K be the newest version that any survivor knows. Every rank was alive after the last device had
ended step K: it could not have cast its second vote otherwise. So no reduction of step K has ended without a peer, each
rank had K in its live tensors, and the host states of K are where they belong. A survivor that has made step K+1 had
saved K before, and any other still has K in its live tensors. A slot with K is overwritten only with K+1 or later, by a
rank that knows that version, which contradicts the choice of K. So every survivor has K, in its slot or in its live
tensors, and a set of survivors with a holder of each shard can assemble it. If no survivor knows the version of its
live tensors, none has overwritten its slot with that version, and all slots contain the version before it.

**One version, never a mix.** Survivors offer what is in their slots and, if they may be needed, their live tensors.
`restorable` disregards a version that no survivor knows, and `newest_complete` combines only replicas of one snapshot.

**The restore** follows the same rule: the inventory, which all ranks have read, replaces the vote. A rank whose live
tensors contain the chosen version saves them before it fills them. Each rank, including a new process, then has that
version in its slots. So a second fault at any point finds the same versions as the first.

**How weaker rules fail.**

- *Save right after step k.* Rank 0 has ended step k and overwrites its slot with k. The process of rank 1 is lost
  before it has ended step k. Shard 0 is left of version k, shard 1 of version k-1.
- *Save directly before step k+1, without a vote.* Every rank has contributed to the gradients of k+1, so every rank
  has version k. But the host state of k has not left rank 1 when it is lost: rank 0 has overwritten its tensors of
  k-1 and has no host state of rank 1 for k.
- *Vote when step k is queued, not when the device has ended it.* All have voted, rank 1 is lost, and the reduction of
  step k on rank 0 ends without an error and with a wrong sum. Rank 0 knows k and saves what is not k.
- *Vote once.* The device of rank 1 has ended step k, rank 1 votes and is lost. The reduction of step k on rank 0 ends
  with a wrong sum, rank 0 votes, and receives the vote that rank 1 has left behind.
- *Offer live tensors that no survivor knows.* Rank 1 has ended step k and delivered its host state, and is lost before
  rank 0's reduction of step k has ended. Rank 0 offers a wrong sum, and k looks complete.
- *Restore before saving.* Rank 0 has k in its slot, rank 1 in its live tensors. Both restore k, and rank 1 fills its
  tensors. Rank 2 is lost in the middle: rank 1 has neither k nor tensors from which to save it.

A slot ends with its process. If all holders of a shard are lost, or all processes, the newest version in the arenas is
restored, by the same choice over the same inventory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.protocol.placement import Placement, place
from lightning_ckptless.protocol.versions import Replica, SlotState, Snapshot, Tier


class Source(StrEnum):
    """Where a rank has a version that it offers."""

    SLOT = "slot"
    LIVE = "live tensors"


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The state of one rank's device tier, as far as the protocol is concerned.

    Args:
        saved: the snapshot in the slots; None if they are empty.
        live: the snapshot that the live tensors contain; None once they may have changed.
        is_known: whether this rank knows that all ranks have voted for `live`.
    """

    saved: Snapshot | None = None
    live: Snapshot | None = None
    is_known: bool = False

    @property
    def may_save(self) -> bool:
        """Whether the live tensors may overwrite the slots."""
        return self.live is not None and self.is_known

    def offers(self) -> tuple[tuple[Source, Snapshot, SlotState], ...]:
        """The versions that this rank offers to a restore, with their states in the inventory."""
        offered: list[tuple[Source, Snapshot, SlotState]] = []
        if self.saved is not None:
            offered.append((Source.SLOT, self.saved, SlotState.COMMITTED))
        if self.live is not None:
            state = SlotState.COMMITTED if self.is_known else SlotState.STAGED
            offered.append((Source.LIVE, self.live, state))
        return tuple(offered)

    def must_save_for(self, found: Snapshot) -> bool:
        """Whether a rank that restores a version has to save its live tensors first, which are about to be filled."""
        return self.live == found


def restorable(inventory: Iterable[Replica]) -> tuple[Replica, ...]:
    """The replicas that may be combined: those of the device tier only if a survivor knows their version."""
    replicas = tuple(inventory)
    known = {r.snapshot for r in replicas if r.tier is Tier.DEVICE and r.state is SlotState.COMMITTED}
    return tuple(r for r in replicas if r.tier is Tier.HOST or r.snapshot in known)


def place_on_devices(placement: Placement, copies: int) -> Placement:
    """Choose the holders of the device tier, whose slots end with their process.

    Args:
        placement: placement of the arenas. If it has copies, they are in other failure domains and so in other
            processes; otherwise the copies of the device tier are placed over ranks.
        copies: replicas of each shard in addition to the writer's own.
    """
    ranks = len(placement.holders)
    if placement.copies or ranks == 1:
        return placement
    return place([f"rank {rank}" for rank in range(ranks)], min(copies, ranks - 1), kind="rank")


def kept_on_devices(placement: Placement) -> dict[int, tuple[int, ...]]:
    """For each rank the shards that it keeps in device memory, its own first."""
    return {rank: (rank, *placement.sources(rank)) for rank in range(len(placement.holders))}


def needed_with(need: Mapping[int, Collection[int]], kept: Mapping[int, Collection[int]]) -> dict[int, Collection[int]]:
    """For each rank the shards that it needs or keeps. Ranks that share a collection usually still share one."""
    shared = {id(shards): shards for shards in need.values()}
    found = {key: frozenset(shards) for key, shards in shared.items()}
    return {
        rank: shards if found[id(shards)].issuperset(kept[rank]) else found[id(shards)].union(kept[rank])
        for rank, shards in need.items()
    }


def slot_bytes(placement: Placement, rank: int, shard_bytes: Sequence[int]) -> int:
    """Device memory that the slots of a rank need: about `(1 + copies) / ranks` of the state."""
    return sum(shard_bytes[shard] for shard in (rank, *placement.sources(rank)))
