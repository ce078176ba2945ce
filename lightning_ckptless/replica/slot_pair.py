"""A slot pair: the two slots that one holder has for one shard, written alternately.

`protocol.slots` explains the rule and why two slots are enough. The slot must be chosen by what the writer of the shard
knows to be committed. Here a holder knows the same: it enters round v+1 only after the vote on v has returned, and the
result is the same on all ranks.
"""

from __future__ import annotations

from lightning_ckptless.protocol.slots import SlotEvent, SlotView, settle, target_slot
from lightning_ckptless.protocol.versions import READABLE, SlotState, Snapshot, Version
from lightning_ckptless.replica.slot import Slot


class SlotPair:
    """The slots of one shard at one holder.

    Args:
        slots: the two slots, as the previous generation left them.
        committed: newest version that has all its copies, known to all ranks; None if the run starts from scratch. If
            both slots contain this version, the one of the later generation is used, because generations that restore
            each other write a version only once.
    """

    def __init__(self, slots: tuple[Slot, Slot], committed: Version | None) -> None:
        self._slots = slots
        self._committed = self._snapshot_of(committed)
        for slot in slots:
            if settle(slot.view, self._committed) is SlotEvent.DISCARD:
                slot.discard()
            elif slot.view == SlotView(SlotState.STAGED, self._committed):
                # The process that had learned of the commit died before it updated this slot. From now on the previous
                # version may be overwritten, and a header must tell which one must not.
                slot.commit()

    def _snapshot_of(self, version: Version | None) -> Snapshot | None:
        views = [slot.view for slot in self._slots]
        held = [view.snapshot for view in views if view.snapshot is not None and view.state in READABLE]
        return max((snapshot for snapshot in held if snapshot.version == version), default=None)

    def free(self) -> Slot:
        """The slot for the next version, after discarding the remains of an aborted round."""
        first, second = self._slots
        slot = self._slots[target_slot((first.view, second.view), self._committed)]
        if slot.view.state in (SlotState.WRITING, SlotState.STAGED):
            slot.discard()
        return slot

    def commit(self, slot: Slot) -> None:
        """Record that all ranks have voted for the version in a slot."""
        slot.commit()
        self._committed = slot.view.snapshot

    def close(self) -> None:
        """Close both slots."""
        for slot in self._slots:
            slot.close()
