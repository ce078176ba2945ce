"""The slot commit: the states of a slot, and which slot the next version is written to.

Each copy of a shard, at its writer and at every holder, has a ring of slots: two, and one more for each version of the
history. A version is written into one of them while another one contains the last committed version. A rank *votes* for
a version when its own copy and the copies that it keeps are sealed. The version is *committed* once all ranks have
voted, and each rank *learns* that at a different time.

**The rule.** A slot is overwritten only if a newer version in another one is committed on all ranks and the writer has
learned so.

**Why it suffices.** Let v be the newest version that any rank knows to be committed. All ranks voted for v, so every
copy of v was sealed at that time. A copy of v is overwritten only by v+2 or later, whose writer has learned that v+1 is
committed; but then v+1 is the newest known version, a contradiction. So whichever processes die, and whenever, the
copies of v are intact in all remaining arenas. Version v+1 may be complete too, if all votes were cast and no rank
survived to learn of it. It is newer and just as valid.

**After a relaunch** the restored version may be complete but have fewer copies than required. It is not committed until
the missing copies are filled in and all ranks have voted for it, as for any other version. Until then, the newest
snapshot that any header marks as committed must not be overwritten. If no copy is missing, the inventory that all ranks
have read replaces the vote. In both cases the headers are updated before anything is overwritten.

**History.** More than two slots change only which of the older versions is overwritten. Those that are at least
`history_every` steps newer than the one kept before them are the history. The version to overwrite is the first of:
the remains of an aborted round; a version newer than the committed one, which belongs to an abandoned branch; one that
is not part of the history; the oldest one. The history therefore costs memory, but no further copy.

**How weaker rules fail.**

- *Overwrite as soon as the other slot is sealed locally.* Rank 0 has sealed v+1 and overwrites its copy of v with v+2.
  Rank 1 has not sealed v+1 yet, and the arena of rank 0's holder is lost. Now v lacks rank 0's shard and v+1 lacks
  rank 1's.
- *Let the holder choose by what it has learned itself.* Rank 0 has learned that v is committed and sends v+1. Its
  holder has voted for v but has not learned of the commit, considers v-1 the last committed version and overwrites v.
  If rank 0's arena is lost now, its shard of v is lost. So the writer's knowledge decides, and it is sent to the holder
  with the data.
- *Treat a restored version as committed.* All ranks have sealed their own copies of v+1 and sent none when all workers
  die. They restore v+1 and overwrite v with v+2. If an arena is lost now, the only copy of a shard of v+1 is lost.

The transitions are a table; an event that is not listed for a state is a bug.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.errors import ProtocolError
from lightning_ckptless.protocol.versions import Complete, Replica, SlotState, Snapshot, Version


class SlotEvent(StrEnum):
    """An event of a slot.

    - `BEGIN`: its contents are about to be overwritten.
    - `SEAL`: contents, checksums and header are written.
    - `COMMIT`: this rank has learned that all ranks voted for the version.
    - `DISCARD`: a new generation finds a version in it that it does not restore, or all ranks go back to an earlier
      one.
    """

    BEGIN = "begin"
    SEAL = "seal"
    COMMIT = "commit"
    DISCARD = "discard"


TRANSITIONS: Mapping[SlotState, Mapping[SlotEvent, SlotState]] = {
    SlotState.EMPTY: {SlotEvent.BEGIN: SlotState.WRITING},
    SlotState.WRITING: {SlotEvent.SEAL: SlotState.STAGED, SlotEvent.DISCARD: SlotState.EMPTY},
    SlotState.STAGED: {SlotEvent.COMMIT: SlotState.COMMITTED, SlotEvent.DISCARD: SlotState.EMPTY},
    SlotState.COMMITTED: {SlotEvent.BEGIN: SlotState.WRITING, SlotEvent.DISCARD: SlotState.EMPTY},
}


@dataclass(frozen=True, slots=True)
class SlotView:
    """The header of a slot, as far as the commit protocol is concerned.

    Args:
        state: state of the slot.
        snapshot: snapshot that the slot contains or is about to contain; None if the slot is empty.
    """

    state: SlotState = SlotState.EMPTY
    snapshot: Snapshot | None = None


def advance(state: SlotState, event: SlotEvent, *, shard: int, rank: int, version: Version | None) -> SlotState:
    """The state of a slot after an event.

    Args:
        state: state before the event.
        event: the event.
        shard: shard of the slot, for the message.
        rank: rank that keeps the copy, for the message.
        version: version concerned, for the message.

    Raises:
        ProtocolError: the event is not allowed in this state.
    """
    allowed = TRANSITIONS[state]
    if event not in allowed:
        raise ProtocolError(
            f"rank {rank}, shard {shard}, {version}: event {event} in a slot in state {state}, "
            f"expected {', '.join(allowed)}"
        )
    return allowed[event]


def target_slot(headers: Sequence[SlotView], committed: Snapshot | None, history_every: int = 1) -> int:
    """The slot to overwrite next; never the one that contains the newest committed snapshot.

    Args:
        headers: headers of the slots of one ring.
        committed: newest snapshot that the *writer* of the shard knows to be committed; None before the first.
        history_every: optimizer steps between two versions of the history.

    Returns:
        Index of the slot.
    """
    others = [index for index, view in enumerate(headers) if committed is None or view.snapshot != committed]
    if len(others) == 1:
        return others[0]
    for remains in ((SlotState.WRITING, SlotState.STAGED), (SlotState.EMPTY,)):
        if found := [index for index in others if headers[index].state in remains]:
            return found[0]
    held = {view.snapshot: index for index, view in enumerate(headers) if view.snapshot is not None and index in others}
    return held[_least_needed(sorted(held), committed, history_every)]


def _least_needed(held: Sequence[Snapshot], committed: Snapshot | None, history_every: int) -> Snapshot:
    """Of committed versions in ascending order, the one that the history can do without."""
    if committed is not None and held[-1] > committed:
        return held[-1]
    kept = held[0]
    following = (*held[1:], *((committed,) if committed is not None else ()))
    for snapshot, newer in zip(held, following, strict=False):
        if newer.version.optimizer_step == snapshot.version.optimizer_step:
            # The state before a validation phase, of which the state after it is there as well.
            return snapshot
        if snapshot is not held[0]:
            if snapshot.version.optimizer_step - kept.version.optimizer_step < history_every:
                return snapshot
            kept = snapshot
    return held[0]


def newest_committed(inventory: Iterable[Replica]) -> Snapshot | None:
    """The newest snapshot that any header marks as committed, which a new generation must not overwrite yet."""
    return max((r.snapshot for r in inventory if r.state is SlotState.COMMITTED), default=None)


def settle(found: SlotView, restored: Snapshot | None) -> SlotEvent | None:
    """What a new generation does with an existing slot, once all ranks agree on what to restore.

    A committed version of a later generation than the restored one is left by a rewind that a fault has interrupted, or
    was incomplete: nothing may continue from it any more.

    Args:
        found: the slot as the previous generation left it.
        restored: the snapshot that all ranks restore; None if they start from scratch.

    Returns:
        The event to apply; None to leave the slot as it is.
    """
    torn = found.state is SlotState.WRITING
    passed_over = found.state is SlotState.STAGED and found.snapshot != restored
    left = found.snapshot is not None and restored is not None and found.snapshot.generation > restored.generation
    return SlotEvent.DISCARD if torn or passed_over or (left and found.state is SlotState.COMMITTED) else None


def absent_copies(
    restored: Complete, holders: Sequence[Sequence[int]], nodes: Sequence[str]
) -> tuple[tuple[int, int], ...]:
    """The copies that must be filled in before a restored version is committed.

    A filled-in copy carries the snapshot that it completes, not the generation that fills it in. A copy on another
    node than its holder's does not count: after ranks are renumbered, a node contains copies of other ranks.

    Args:
        restored: the version that all ranks restore.
        holders: for each shard the ranks, other than its writer, that should keep a copy.
        nodes: name of each rank's node.

    Returns:
        Pairs of shard and the rank that should keep it, the writer's own copies included.
    """
    return tuple(
        (shard, rank)
        for shard, (kept, others) in enumerate(zip(restored.replicas, holders, strict=True))
        for rank in (shard, *others)
        if (rank, nodes[rank]) not in {(replica.holder, replica.node) for replica in kept}
    )


def refill_slot(
    headers: Sequence[SlotView], restored: Snapshot, committed: Snapshot | None, history_every: int = 1
) -> int:
    """The slot into which a missing copy of a restored version is written.

    A slot whose header already names that version contains damaged or incomplete data. It must be the one that is
    written: otherwise two slots would carry the same snapshot and be indistinguishable.

    Args:
        headers: headers of the slots of one ring.
        restored: snapshot that is filled in.
        committed: newest snapshot that any header marks as committed.
        history_every: optimizer steps between two versions of the history.

    Returns:
        Index of the slot; never a slot with the committed snapshot, unless that is the restored one.
    """
    claims = [number for number, view in enumerate(headers) if view.snapshot == restored]
    return claims[0] if claims else target_slot(headers, committed, history_every)
