"""The decision on a rewind: which version all ranks go back to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.rewind import (
    MOST_IN_A_ROW,
    NoRewind,
    PastRewinds,
    RewindAsked,
    RewindPlan,
    RewindState,
    plan_rewind,
    steps_of,
)
from lightning_ckptless.protocol.versions import Replica, SlotState, Version, complete_versions


def versions(*steps: int) -> list[Version]:
    return [Version(step, True) for step in steps]


def planned(found: RewindPlan | NoRewind) -> RewindPlan:
    assert isinstance(found, RewindPlan), found
    return found


def refused(found: RewindPlan | NoRewind) -> NoRewind:
    assert isinstance(found, NoRewind), found
    return found


KEPT = versions(8, 12, 16, 19, 20)


def test_the_earliest_target_counts() -> None:
    asked = [RewindAsked(16, 20, skip_batches=3), RewindAsked(12, 21, skip_to_batch=40), RewindAsked(12, 20, 2, 7)]
    plan = planned(plan_rewind(asked, KEPT, 21, PastRewinds()))
    assert (plan.version, plan.skip_batches, plan.skip_to_batch) == (Version(12, True), 2, 40)
    assert plan.reason == "from step 21 back to step 12: requested by the script, the earliest of 3 requests"
    assert plan.past == PastRewinds(1, 21, 12)


def test_between_two_versions_the_older_one_is_taken() -> None:
    plan = planned(plan_rewind([RewindAsked(15, 20)], KEPT, 21, PastRewinds()))
    assert plan.version == Version(12, True)
    assert plan.reason == "from step 21 back to step 12 instead of step 15: requested by the script"


def test_the_state_after_a_validation_is_preferred() -> None:
    both = [Version(12, False), Version(12, True)]
    assert planned(plan_rewind([RewindAsked(12, 20)], both, 21, PastRewinds())).version == Version(12, True)
    assert planned(plan_rewind([RewindAsked(12, 20)], both[:1], 21, PastRewinds())).version == Version(12, False)


def test_a_step_beyond_the_history_names_those_that_exist() -> None:
    answer = refused(plan_rewind([RewindAsked(5, 20)], KEPT, 21, PastRewinds()))
    assert "cannot go back to step 5: the history has steps 8, 12, 16, 19 to 20." in answer.reason
    assert answer.ends_run
    assert not refused(plan_rewind([RewindAsked(5, 20, request=1)], KEPT, 21, PastRewinds())).ends_run
    assert "the newest step is 21" in refused(plan_rewind([RewindAsked(22, 20)], KEPT, 21, PastRewinds())).reason


def test_rewinds_without_progress_go_back_twice_as_far_and_then_end_the_run() -> None:
    kept, past, reached = versions(*range(1, 31)), PastRewinds(), []
    while isinstance(found := plan_rewind([RewindAsked(28, 30)], kept, 30, past), RewindPlan):
        reached.append(found.version.optimizer_step)
        past = found.past
        kept = versions(*range(1, found.version.optimizer_step + 1))
    assert reached == [28, 26, 22] and len(reached) == MOST_IN_A_ROW
    assert found.ends_run
    assert "rewound 3 times in a row without getting beyond step 30" in found.reason
    assert "lower the learning rate" in found.reason


def test_with_progress_in_between_a_rewind_is_a_new_one() -> None:
    past = PastRewinds(2, at_step=30, to_step=26)
    kept = versions(*range(20, 32))
    assert planned(plan_rewind([RewindAsked(30, 31)], kept, 31, past)).past == PastRewinds(1, 31, 30)
    again = planned(plan_rewind([RewindAsked(29, 30)], kept, 31, past))
    assert again.version == Version(22, True) and "rewind 3 of at most 3 without progress" in again.reason


def test_the_oldest_version_is_the_last_resort() -> None:
    past = PastRewinds(1, at_step=30, to_step=20)
    assert planned(plan_rewind([RewindAsked(20, 30)], versions(18, 20, 30), 30, past)).version == Version(18, True)
    assert refused(plan_rewind([RewindAsked(20, 30)], versions(20, 30), 30, past)).ends_run


@given(
    st.lists(st.builds(RewindAsked, st.integers(0, 40), st.integers(0, 40), st.integers(0, 5)), min_size=1, max_size=4),
    st.sets(st.integers(0, 40)),
    st.builds(PastRewinds, st.integers(0, 4), st.integers(-1, 40), st.integers(-1, 40)),
)
def test_no_rewind_goes_further_forward_than_any_rank_asks(
    asked: list[RewindAsked], steps: set[int], past: PastRewinds
) -> None:
    found = plan_rewind(asked, versions(*steps), 40, past)
    if isinstance(found, RewindPlan):
        assert found.version.optimizer_step <= min(each.step for each in asked)
        assert found.version.optimizer_step in steps
        assert 1 <= found.past.count <= MOST_IN_A_ROW
    else:
        assert found.reason


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(1, 50))
def test_a_batch_of_the_epoch_is_always_left(skip: int, to_batch: int, done: int, left: int) -> None:
    plan = RewindPlan(Version(1, True), 2, skip, to_batch, PastRewinds(), "")
    count = plan.batches_to_skip(done, left)
    assert 0 <= count < left
    assert count == min(max(skip, to_batch - done, 0), left - 1)


@given(st.sets(st.integers(0, 30), min_size=1))
def test_steps_are_named_as_ranges(steps: set[int]) -> None:
    words = steps_of(versions(*steps)).removeprefix("steps ").removeprefix("step ").split(", ")
    named = [range(int(word.split(" to ")[0]), int(word.split(" to ")[-1]) + 1) for word in words]
    assert [step for each in named for step in each] == sorted(steps)


def test_the_state_is_restored_from_plain_values() -> None:
    state = RewindState((RewindAsked(3, 5, 1, 0, "a spike"),), PastRewinds(1, 5, 3))
    assert RewindState.from_dict(state.to_dict()) == state


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_only_complete_versions_are_kept(lost: int | None) -> None:
    inventory = [
        Replica(shard, shard, "n", step, Version(step, True), generation, 2, layout, state, 8, 4, "")
        for shard in (0, 1)
        for step, generation, layout, state in [
            (1, 1, "a", SlotState.COMMITTED),
            (2, 1 + shard, "a", SlotState.COMMITTED),
            (3, 1, "b", SlotState.COMMITTED),
            (4, 2, "a", SlotState.STAGED),
            (5, 2, "a", SlotState.WRITING),
        ]
        if shard != lost
    ]
    found = complete_versions(inventory, world_size=2, layout="a")
    assert found == (versions(1, 4) if lost is None else [])
