"""The state table of a slot and the rules around it."""

from __future__ import annotations

import pytest

from lightning_ckptless.errors import ProtocolError
from lightning_ckptless.protocol.slots import (
    TRANSITIONS,
    SlotEvent,
    SlotView,
    absent_copies,
    advance,
    newest_committed,
    refill_slot,
    settle,
    target_slot,
)
from lightning_ckptless.protocol.versions import Complete, Replica, SlotState, Snapshot, Version


def snapshot(step: int, generation: int = 1) -> Snapshot:
    return Snapshot(Version(step, True), generation, 2, "layout")


def replica(shard: int, holder: int, state: SlotState = SlotState.STAGED, step: int = 5) -> Replica:
    return Replica(shard, holder, f"n{holder}", 0, Version(step, True), 1, 2, "layout", state, 8, 4, "")


def test_the_states_of_a_slot_in_order() -> None:
    states = [SlotState.EMPTY]
    for event in (SlotEvent.BEGIN, SlotEvent.SEAL, SlotEvent.COMMIT, SlotEvent.BEGIN, SlotEvent.DISCARD):
        states.append(advance(states[-1], event, shard=1, rank=0, version=Version(5, True)))
    assert states == ["empty", "writing", "staged", "committed", "writing", "empty"]


@pytest.mark.parametrize(
    ("state", "event"), [(s, e) for s in SlotState for e in SlotEvent if e not in TRANSITIONS[s]], ids=str
)
def test_the_error_for_an_event_not_in_the_table_is_complete(state: SlotState, event: SlotEvent) -> None:
    with pytest.raises(ProtocolError) as caught:
        advance(state, event, shard=1, rank=3, version=Version(5, False))
    message = str(caught.value)
    assert message.startswith(
        f"rank 3, shard 1, step 5 (before validation): event {event} in a slot in state {state}, expected"
    )
    assert all(allowed in message for allowed in TRANSITIONS[state])


def test_the_target_is_the_slot_without_the_committed_snapshot() -> None:
    old, new = SlotView(SlotState.COMMITTED, snapshot(4)), SlotView(SlotState.COMMITTED, snapshot(5))
    assert target_slot((SlotView(), SlotView()), None) == 0
    assert target_slot((old, SlotView()), snapshot(4)) == 1
    assert target_slot((old, new), snapshot(5)) == 0
    assert target_slot((new, old), snapshot(5)) == 1
    assert target_slot((SlotView(), SlotView()), snapshot(5)) == 0


def test_of_two_slots_with_one_version_the_committed_generation_is_spared() -> None:
    earlier, later = SlotView(SlotState.STAGED, snapshot(5, 1)), SlotView(SlotState.STAGED, snapshot(5, 2))
    assert target_slot((earlier, later), snapshot(5, 1)) == 1
    assert target_slot((earlier, later), snapshot(5, 2)) == 0


@pytest.mark.parametrize(
    ("found", "event"),
    [
        (SlotView(), None),
        (SlotView(SlotState.WRITING, snapshot(5)), SlotEvent.DISCARD),
        (SlotView(SlotState.STAGED, snapshot(5)), None),
        (SlotView(SlotState.STAGED, snapshot(6)), SlotEvent.DISCARD),
        (SlotView(SlotState.COMMITTED, snapshot(4)), None),
        (SlotView(SlotState.COMMITTED, snapshot(5)), None),
    ],
)
def test_a_new_generation_discards_torn_and_unrestored_versions(found: SlotView, event: SlotEvent | None) -> None:
    assert settle(found, snapshot(5)) == event


def test_one_header_marked_as_committed_is_enough() -> None:
    inventory = [
        replica(0, 0, SlotState.STAGED, 6),
        replica(0, 1, SlotState.COMMITTED, 5),
        replica(1, 1, SlotState.COMMITTED, 4),
    ]
    assert newest_committed(inventory) == snapshot(5)
    assert newest_committed(inventory[:1]) is None


def test_absent_copies_are_those_that_the_placement_requires_and_no_rank_has() -> None:
    restored = Complete(snapshot(5), ((replica(0, 0),), (replica(1, 0),)), "")
    assert absent_copies(restored, [(1,), (0,)], ["n0", "n1"]) == ((0, 1), (1, 1))
    assert absent_copies(restored, [(), ()], ["n0", "n1"]) == ((1, 1),)


def test_copies_on_the_nodes_of_other_ranks_are_absent() -> None:
    everything = tuple((replica(shard, shard), replica(shard, 1 - shard)) for shard in (0, 1))
    restored = Complete(snapshot(5), everything, "")
    assert absent_copies(restored, [(1,), (0,)], ["n0", "n1"]) == ()
    assert absent_copies(restored, [(1,), (0,)], ["n1", "n0"]) == ((0, 0), (0, 1), (1, 1), (1, 0))


@pytest.mark.parametrize("state", [SlotState.WRITING, SlotState.STAGED, SlotState.COMMITTED])
@pytest.mark.parametrize("number", [0, 1])
def test_an_absent_copy_overwrites_a_damaged_one(number: int, state: SlotState) -> None:
    bad, other = SlotView(state, snapshot(5)), SlotView(SlotState.COMMITTED, snapshot(4))
    headers = (bad, other) if number == 0 else (other, bad)
    assert refill_slot(headers, snapshot(5), snapshot(4)) == number
    assert refill_slot(headers, snapshot(5), snapshot(5)) == number


def test_an_absent_copy_does_not_overwrite_the_committed_one() -> None:
    old, older = SlotView(SlotState.STAGED, snapshot(4)), SlotView(SlotState.COMMITTED, snapshot(3))
    assert refill_slot((old, older), snapshot(5), snapshot(4)) == 1
    assert refill_slot((older, old), snapshot(5), snapshot(4)) == 0
    assert refill_slot((SlotView(), SlotView()), snapshot(5), snapshot(4)) == 0
