"""A slot pair: the two slots that one holder has for one shard, written in turn.

`protocol.slots` has the rule and says why two are enough. It wants the slot chosen by what the writer of the shard
knows to be committed. A holder knows the same here: it meets round v+1 only after its own vote on v was answered, and
the answer is one for all ranks.
"""

from __future__ import annotations

from lightning_ckptless.protocol.slots import SlotEvent, SlotView, settle, target_slot
from lightning_ckptless.protocol.versions import READABLE, SlotState, Snapshot, Version
from lightning_ckptless.replica.slot import Slot


class SlotPair:
    """The slots of one shard at one holder.

    Args:
        slots: the pair, as the last generation left it.
        committed: newest version that has all its copies, and all ranks know it; None when they begin anew. A version
            is written once in a line of generations that restore each other, so where two slots have it, the later
            generation's is meant.
    """

    def __init__(self, slots: tuple[Slot, Slot], committed: Version | None) -> None:
        self._slots = slots
        self._committed = self._snapshot_of(committed)
        for slot in slots:
            if settle(slot.view, self._committed) is SlotEvent.DISCARD:
                slot.discard()
            elif slot.view == SlotView(SlotState.STAGED, self._committed):
                # Whoever learned of it first died before this slot was told. From now on the version before may be
                # written over, and a header must say which one to spare.
                slot.commit()

    def _snapshot_of(self, version: Version | None) -> Snapshot | None:
        views = [slot.view for slot in self._slots]
        held = [view.snapshot for view in views if view.snapshot is not None and view.state in READABLE]
        return max((snapshot for snapshot in held if snapshot.version == version), default=None)

    def free(self) -> Slot:
        """The slot for the next version, rid of what a round that was voted down left in it."""
        first, second = self._slots
        slot = self._slots[target_slot((first.view, second.view), self._committed)]
        if slot.view.state in (SlotState.WRITING, SlotState.STAGED):
            slot.discard()
        return slot

    def commit(self, slot: Slot) -> None:
        """Note that all ranks have voted for the version in a slot."""
        slot.commit()
        self._committed = slot.view.snapshot

    def close(self) -> None:
        """Close both slots."""
        for slot in self._slots:
            slot.close()
