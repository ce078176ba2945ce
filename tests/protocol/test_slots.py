"""The state table of a slot and the rules around it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

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


def steps_kept(steps: list[int], slots: int, every: int) -> list[int]:
    """Write versions, each committed before the next; return the steps that are there in the end."""
    ring, committed = [SlotView()] * slots, None
    for step in steps:
        index = target_slot(ring, committed, every)
        assert committed is None or ring[index].snapshot != committed
        committed = snapshot(step)
        ring[index] = SlotView(SlotState.COMMITTED, committed)
    return sorted(view.snapshot.version.optimizer_step for view in ring if view.snapshot is not None)


def test_the_history_holds_versions_at_its_interval_and_the_two_newest() -> None:
    assert steps_kept(list(range(1, 31)), slots=5, every=1) == [26, 27, 28, 29, 30]
    assert steps_kept(list(range(1, 31)), slots=5, every=8) == [9, 17, 25, 29, 30]
    assert steps_kept(list(range(1, 31)), slots=2, every=8) == [29, 30]


@example([1] * 7, 1, 4)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=60), st.integers(0, 5), st.integers(1, 7))
def test_the_history_reaches_back_as_far_as_promised(gaps: list[int], history: int, every: int) -> None:
    steps = [sum(gaps[: index + 1]) for index in range(len(gaps))]
    kept = steps_kept(steps, 2 + history, every)
    assert kept[-1] == steps[-1]
    # The newest version of the history is at least two steps old, and the others are `every` steps apart.
    reach = (history - 1) * every + 2 if history else 1
    assert kept[0] <= max(steps[0], steps[-1] - reach)
    due = [step for step in steps if step >= kept[0]]
    assert all(any(0 <= step - older < every + max(gaps) for older in kept) for step in due)


@given(
    st.lists(st.tuples(st.sampled_from(SlotState), st.integers(0, 6), st.integers(1, 3)), min_size=2, max_size=6),
    st.integers(0, 6),
    st.integers(1, 4),
)
def test_the_newest_committed_version_is_never_the_target(
    slots: list[tuple[SlotState, int, int]], number: int, every: int
) -> None:
    views = [SlotView() if state is SlotState.EMPTY else SlotView(state, snapshot(*of)) for state, *of in slots]
    held = sorted({view.snapshot for view in views if view.state is SlotState.COMMITTED and view.snapshot is not None})
    committed = held[number % len(held)] if held else None
    if [view.snapshot for view in views].count(committed) > 1:
        return
    found = target_slot(views, committed, every)
    assert views[found].snapshot is None or views[found].snapshot != committed
    if any(view.state is not SlotState.COMMITTED for view in views):
        assert views[found].state is not SlotState.COMMITTED
    elif committed is not None and held[-1] > committed:
        assert views[found].snapshot == held[-1], "a version of an abandoned branch goes first"


def test_the_state_before_a_validation_is_not_part_of_the_history() -> None:
    before, after = Snapshot(Version(3, False), 1, 2, "layout"), snapshot(3)
    ring = [SlotView(SlotState.COMMITTED, each) for each in (snapshot(1), snapshot(2), before, after)]
    assert target_slot(ring, after) == 2


@pytest.mark.parametrize(
    ("found", "event"),
    [
        (SlotView(), None),
        (SlotView(SlotState.WRITING, snapshot(5)), SlotEvent.DISCARD),
        (SlotView(SlotState.STAGED, snapshot(5)), None),
        (SlotView(SlotState.STAGED, snapshot(6)), SlotEvent.DISCARD),
        (SlotView(SlotState.COMMITTED, snapshot(4)), None),
        (SlotView(SlotState.COMMITTED, snapshot(5)), None),
        (SlotView(SlotState.COMMITTED, snapshot(4, 2)), SlotEvent.DISCARD),
        (SlotView(SlotState.COMMITTED, snapshot(6, 2)), SlotEvent.DISCARD),
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
