"""A slot ring: the slots that one holder has for one shard.

`protocol.slots` explains which of them is written next and why two are enough. The slot must be chosen by what the
writer of the shard knows to be committed. Here a holder knows the same: it enters round v+1 only after the vote on v
has returned, and the result is the same on all ranks. The slots beyond two hold the history.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ckptless.protocol.slots import SlotEvent, SlotView, settle, target_slot
from lightning_ckptless.protocol.versions import READABLE, SlotState, Snapshot, Version
from lightning_ckptless.replica.slot import Slot


class SlotRing:
    """The slots of one shard at one holder.

    Args:
        slots: the slots, as the previous generation left them.
        committed: newest version that has all its copies, known to all ranks; None if the run starts from scratch. If
            several slots contain this version, the one of the latest generation is used, because generations that
            restore each other write a version only once.
        history_every: optimizer steps between two versions of the history.
    """

    def __init__(self, slots: Sequence[Slot], committed: Version | None, history_every: int = 1) -> None:
        self._slots = slots
        self._history_every = history_every
        self._committed = self._snapshot_of(committed)
        for slot in slots:
            if settle(slot.view, self._committed) is SlotEvent.DISCARD:
                slot.discard()
            elif slot.view == SlotView(SlotState.STAGED, self._committed):
                # The process that had learned of the commit died before it updated this slot. From now on the previous
                # version may be overwritten, and a header must tell which one must not.
                slot.commit()

    def __len__(self) -> int:
        return len(self._slots)

    def _snapshot_of(self, version: Version | None) -> Snapshot | None:
        views = [slot.view for slot in self._slots]
        held = [view.snapshot for view in views if view.snapshot is not None and view.state in READABLE]
        return max((snapshot for snapshot in held if snapshot.version == version), default=None)

    @property
    def oldest(self) -> Version | None:
        """The oldest committed version."""
        views = [slot.view for slot in self._slots]
        held = [view.snapshot.version for view in views if view.snapshot and view.state is SlotState.COMMITTED]
        return min(held, default=None)

    def free(self) -> Slot:
        """The slot for the next version, after discarding the remains of an aborted round."""
        slot = self._slots[target_slot([slot.view for slot in self._slots], self._committed, self._history_every)]
        if slot.view.state in (SlotState.WRITING, SlotState.STAGED):
            slot.discard()
        return slot

    def commit(self, slot: Slot) -> None:
        """Record that all ranks have voted for the version in a slot."""
        slot.commit()
        self._committed = slot.view.snapshot

    def go_back_to(self, snapshot: Snapshot) -> None:
        """Discard all versions but a committed snapshot and those before it, the newest one last.

        A fault in between leaves the newest version complete, or none that is newer than the snapshot: as long as a
        ring has its copy of the newest one, that shard is not what this version lacks.
        """
        held = [(view.snapshot, slot) for slot in self._slots if (view := slot.view).snapshot is not None]
        for found, slot in sorted(held, key=lambda each: each[0]):
            if found.version >= snapshot.version and found != snapshot:
                slot.discard()

    def close(self) -> None:
        """Close all slots."""
        for slot in self._slots:
            slot.close()
