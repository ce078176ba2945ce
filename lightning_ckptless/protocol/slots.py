"""The two-slot commit: what a slot may become, and which slot the next version goes to.

Each copy of a shard, the writer's own and every kept one, has two slots. A version is written into one of them while
the other holds the last committed version. A rank *votes* for a version when its own copy and the copies that it
keeps are sealed; the version is *committed* once all ranks have voted, and each rank *learns* that in its own time.

**The rule.** A slot is overwritten only when the other one is committed on all ranks, and the writer has learned so.

**Why it suffices.** Let v be the newest version that any rank knows to be committed. All ranks voted for v, so every
copy of v was sealed then. A copy of v is overwritten only by v+2, whose writer has learned that v+1 is committed; but
then v+1 is the newest known one. So whatever dies, and whenever, the copies of v are whole in all arenas that are left.
The version v+1 may be whole too, when its votes were cast and nobody lived to learn of it: it is newer, and as good.

**After a relaunch** the restored version may be whole but thin: some shards have fewer copies than they should. It is
not committed until its missing copies are filled in and all ranks have voted for it like for any other version;
meanwhile the newest snapshot that any header calls committed is the one that must not be overwritten. Where no copy is
missing, the inventory that all ranks have read stands for the vote. Either way the headers are told before anything is
overwritten.

**What breaks weaker rules.**

- *Overwrite when the other slot is in place here.* Rank 0 has v+1 in place and writes v+2 over its copy of v; rank 1
  has not sealed v+1 yet, and the arena that keeps rank 0's copy of v is lost. Of v rank 0's shard is gone, of v+1
  rank 1's.
- *Let the holder choose by what it has learned itself.* Rank 0 has learned that v is committed and sends v+1; its
  holder has voted for v but not learned, takes v-1 for the last committed version and overwrites v. If rank 0's arena
  is lost now, its shard of v is gone. So the writer's knowledge decides, and the holder is told with the bytes.
- *Take what was restored for committed.* All ranks have sealed their own copies of v+1 and sent none when all workers
  die. They restore v+1, write v+2 over v, and an arena is lost: of v+1 it held the only copy of a shard.

The states are a table; an event that a state does not list is a bug.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.errors import ProtocolError
from lightning_ckptless.protocol.versions import Complete, Replica, SlotState, Snapshot, Version


class SlotEvent(StrEnum):
    """What happens to a slot.

    - `BEGIN`: its bytes are about to be overwritten.
    - `SEAL`: bytes, checksums and header are in place.
    - `COMMIT`: this rank has learned that all ranks voted for the version.
    - `DISCARD`: a new generation finds a version in it that it does not restore.
    """

    BEGIN = "begin"
    SEAL = "seal"
    COMMIT = "commit"
    DISCARD = "discard"


TRANSITIONS: Mapping[SlotState, Mapping[SlotEvent, SlotState]] = {
    SlotState.EMPTY: {SlotEvent.BEGIN: SlotState.WRITING},
    SlotState.WRITING: {SlotEvent.SEAL: SlotState.STAGED, SlotEvent.DISCARD: SlotState.EMPTY},
    SlotState.STAGED: {SlotEvent.COMMIT: SlotState.COMMITTED, SlotEvent.DISCARD: SlotState.EMPTY},
    SlotState.COMMITTED: {SlotEvent.BEGIN: SlotState.WRITING},
}


@dataclass(frozen=True, slots=True)
class SlotView:
    """What the header of a slot says.

    Args:
        state: state of the slot.
        snapshot: what the slot holds or is about to hold; None when it is empty.
    """

    state: SlotState = SlotState.EMPTY
    snapshot: Snapshot | None = None


def advance(state: SlotState, event: SlotEvent, *, shard: int, rank: int, version: Version | None) -> SlotState:
    """The state of a slot after an event.

    Args:
        state: state before the event.
        event: what happens.
        shard: shard that the slot holds, for the message.
        rank: rank in whose arena the slot is, for the message.
        version: version concerned, for the message.

    Raises:
        ProtocolError: the event is not allowed in this state.
    """
    allowed = TRANSITIONS[state]
    if event not in allowed:
        raise ProtocolError(
            f"rank {rank}, shard {shard}, {version}: {event} in a slot that is {state}, "
            f"where only {', '.join(allowed)} may happen"
        )
    return allowed[event]


def target_slot(headers: tuple[SlotView, SlotView], committed: Snapshot | None) -> int:
    """The slot to be overwritten next: the one that does not hold the newest committed snapshot.

    Args:
        headers: the two slots of a copy of a shard.
        committed: newest snapshot that the *writer* of the shard knows to be committed; None before the first.

    Returns:
        0 or 1; 0 where neither slot holds the snapshot.
    """
    return 1 if committed is not None and headers[0].snapshot == committed else 0


def newest_committed(inventory: Iterable[Replica]) -> Snapshot | None:
    """The newest snapshot that any header calls committed: what a new generation must not overwrite yet."""
    return max((r.snapshot for r in inventory if r.state is SlotState.COMMITTED), default=None)


def settle(found: SlotView, restored: Snapshot | None) -> SlotEvent | None:
    """What a new generation does to a slot that it finds, once all ranks agree on what to restore.

    Args:
        found: the slot as the last generation left it.
        restored: the snapshot that all ranks restore; None when they begin anew.

    Returns:
        The event to apply, or None where the slot stays as it is.
    """
    torn = found.state is SlotState.WRITING
    passed_over = found.state is SlotState.STAGED and found.snapshot != restored
    return SlotEvent.DISCARD if torn or passed_over else None


def absent_copies(
    restored: Complete, holders: Sequence[Sequence[int]], nodes: Sequence[str]
) -> tuple[tuple[int, int], ...]:
    """The copies that must be filled in before a restored version is committed.

    A copy that is filled in carries the snapshot it completes, not the generation that fills it in. A copy on another
    node than its holder's does not count: where ranks are numbered anew, each finds the copies of another one.

    Args:
        restored: the version that all ranks restore.
        holders: for each shard the ranks, beyond its writer, that are to keep a copy.
        nodes: name of each rank's node.

    Returns:
        Pairs of shard and rank that is to keep it, the writer's own copies included.
    """
    return tuple(
        (shard, rank)
        for shard, (kept, others) in enumerate(zip(restored.replicas, holders, strict=True))
        for rank in (shard, *others)
        if (rank, nodes[rank]) not in {(replica.holder, replica.node) for replica in kept}
    )


def refill_slot(headers: tuple[SlotView, SlotView], restored: Snapshot, committed: Snapshot | None) -> int:
    """The slot that an absent copy of a restored version is written into.

    A slot that claims to hold that version has bytes that are damaged or not all there. It is the one to be written:
    a second slot with the same snapshot would leave the two to be told apart by nothing.

    Args:
        headers: the two slots of the copy.
        restored: what is filled in.
        committed: newest snapshot that any header calls committed.

    Returns:
        0 or 1; never a slot that holds the committed snapshot, unless that is the restored one.
    """
    claims = [number for number, view in enumerate(headers) if view.snapshot == restored]
    return claims[0] if claims else target_slot(headers, committed)
