"""The rank that lags behind the others is the one that hangs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.hang_detection import (
    ANSWER_S,
    CEILING_S,
    FLOOR_S,
    GROUP_S,
    IDLE_S,
    REGROUP_S,
    RELEASE_S,
    STARTUP_S,
    STOPPED_S,
    STUCK_COLLECTIVE_S,
    Idleness,
    Point,
    RankProgress,
    RegroupStatus,
    SleepingThread,
    are_silent,
    find_hang,
    find_late,
    find_stuck_collective,
    find_unreleased,
    limit_s,
    should_ask,
    unchanged_since,
)

AHEAD = RankProgress(step=9, point=Point.BACKWARD, count=0, at=100.0, longest_pause_s=0.5, own_s=0.1)
BEHIND = replace(AHEAD, point=Point.BATCH, at=99.0)
LATE = 100.0 + FLOOR_S + 1.0


def test_the_rank_that_lags_hangs() -> None:
    hang = find_hang({0: AHEAD, 1: BEHIND, 2: AHEAD}, now=LATE)
    assert hang is not None
    assert hang.ranks == (1,)
    assert "batch of step 9" in hang.reason and "11.0 s" in hang.reason
    assert hang.silent_s == 11.0


def test_no_rank_hangs_before_the_limit() -> None:
    assert find_hang({0: AHEAD, 1: BEHIND}, now=100.0 + FLOOR_S) is None


def test_progress_of_one_is_progress_of_all() -> None:
    assert find_hang({0: replace(AHEAD, at=LATE), 1: BEHIND}, now=LATE + 1.0) is None


@pytest.mark.parametrize("how", ["traced", "outside", "all stopped", "at the same point"])
def test_silence_that_is_no_hang(how: str) -> None:
    progress = {
        "traced": {0: AHEAD, 1: replace(BEHIND, traced=True)},
        "outside": {0: AHEAD, 1: replace(BEHIND, point=Point.OUTSIDE)},
        "all stopped": {0: replace(AHEAD, stopped=True), 1: replace(BEHIND, stopped=True)},
        "at the same point": {0: AHEAD, 1: AHEAD},
    }[how]
    assert find_hang(progress, now=LATE) is None


def test_a_stopped_rank_hangs_even_if_it_does_not_lag() -> None:
    hang = find_hang({0: AHEAD, 1: replace(AHEAD, stopped=True)}, now=LATE)
    assert hang is not None and hang.ranks == (1,)


def test_ranks_at_the_same_point_hang_only_at_the_ceiling() -> None:
    waiting = replace(AHEAD, waits=True)
    assert find_hang({0: waiting, 1: waiting}, now=100.0 + CEILING_S - 1) is None
    hang = find_hang({0: waiting, 1: waiting}, now=100.0 + CEILING_S + 1)
    assert hang is not None and hang.ranks == (0, 1)


def test_ranks_at_one_point_are_not_blamed_while_those_of_another_node_make_progress() -> None:
    waiting = replace(AHEAD, waits=True)
    assert find_hang({0: waiting, 1: waiting}, now=100.0 + CEILING_S + 1, is_whole=False) is None
    hang = find_hang({0: AHEAD, 1: BEHIND}, now=LATE, is_whole=False)
    assert hang is not None and hang.ranks == (1,), "a rank that lags on its own node is found without the other nodes"


@pytest.mark.parametrize(
    ("waits", "hangs"),
    [
        ((True, False, True), (1,)),
        ((False, False, True), (0, 1)),
        ((True, True, True), None),
        # All ranks compute, e.g. compile a model; or not all have answered.
        ((False, False, False), None),
        ((True, False, None), None),
    ],
)
def test_in_the_backward_pass_a_rank_that_does_not_wait_hangs(
    waits: tuple[bool | None, ...], hangs: tuple[int, ...] | None
) -> None:
    progress = {rank: replace(AHEAD, waits=word) for rank, word in enumerate(waits)}
    assert are_silent(progress, now=LATE) and not are_silent(progress, now=100.0)
    assert should_ask(progress)
    hang = find_hang(progress, now=LATE)
    assert (None if hang is None else hang.ranks) == hangs
    # Elsewhere than in the backward pass rank 0 may write a large file meanwhile.
    elsewhere = {rank: replace(rank_progress, point=Point.VALIDATION) for rank, rank_progress in progress.items()}
    assert not should_ask(elsewhere)
    assert find_hang(elsewhere, now=LATE) is None
    limited = find_hang(elsewhere, now=LATE, override_s=5.0) if hangs else None
    assert (None if limited is None else limited.ranks) == hangs


def test_a_rank_that_is_idle_while_the_others_wait_hangs() -> None:
    progress = {
        0: replace(AHEAD, point=Point.VALIDATION, waits=False),
        1: replace(AHEAD, point=Point.VALIDATION, waits=True),
    }
    assert find_hang(progress, now=LATE + IDLE_S) is None
    idle = {rank: replace(rank_progress, idle_s=IDLE_S + 1.0) for rank, rank_progress in progress.items()}
    assert should_ask(idle)
    hang = find_hang(idle, now=LATE + IDLE_S)
    assert hang is not None and hang.ranks == (0,)
    # Where all are idle and none waits, or all wait, no rank is known to be at fault.
    for waits in (True, False):
        same = {rank: replace(rank_progress, waits=waits) for rank, rank_progress in idle.items()}
        assert find_hang(same, now=LATE + IDLE_S) is None


@pytest.mark.parametrize("override_s", [None, 5.0])
def test_a_rank_that_is_idle_while_a_version_is_restored_hangs(override_s: float | None) -> None:
    restoring = replace(AHEAD, step=0, point=Point.RESTORE, waits=True)
    progress = {0: restoring, 1: replace(restoring, waits=False, idle_s=FLOOR_S + 1.0), 2: replace(AHEAD, waits=True)}
    assert limit_s({0: replace(restoring, longest_pause_s=60.0)}, None) == RELEASE_S
    assert are_silent(progress, now=LATE, override_s=override_s)
    assert should_ask(progress, override_s=override_s)
    hang = find_hang(progress, now=LATE, override_s=override_s)
    assert hang is not None and hang.ranks == (1,)
    # A rank that lags may have more to restore than the others, and one that waits is not at fault.
    for spared in ({"idle_s": 4.0}, {"waits": True}):
        assert find_hang({**progress, 1: replace(progress[1], **spared)}, now=LATE, override_s=override_s) is None
    busy = {**progress, 1: replace(progress[1], idle_s=0.0)}
    late = find_hang(busy, now=101.0 + CEILING_S, override_s=override_s)
    assert late is not None and late.ranks == (0, 1)
    # The only rank of its machine, whose peers wait elsewhere.
    assert find_hang({1: progress[1]}, now=LATE, override_s=override_s) is not None


def test_a_process_is_idle_since_it_last_worked() -> None:
    idleness = Idleness(used_s=5.0, since=100.0)
    for now, used_s in ((100.25, 5.01), (130.0, 5.1), (160.0, 5.2)):
        assert idleness.after(used_s, now) == idleness
    assert idleness.after(5.5, 160.0) == Idleness(5.5, 160.0)
    # A child that has exited and was not reaped yet is not counted.
    assert idleness.after(4.0, 160.0) == idleness


def test_detection_waits_for_answers() -> None:
    progress = {0: AHEAD, 1: AHEAD}
    assert find_hang(progress, now=102.0, override_s=1.0) is None
    assert find_hang(progress, now=101.1 + ANSWER_S, override_s=1.0) is not None
    told = {rank: replace(rank_progress, waits=True) for rank, rank_progress in progress.items()}
    assert find_hang(told, now=102.0, override_s=1.0) is not None


def test_limit_is_learned_between_floor_and_ceiling() -> None:
    assert limit_s({0: replace(AHEAD, longest_pause_s=0.0)}, None) == CEILING_S
    assert limit_s({0: replace(AHEAD, longest_pause_s=0.1)}, None) == FLOOR_S
    assert limit_s({0: replace(AHEAD, longest_pause_s=5.0), 1: AHEAD}, None) == 40.0
    assert limit_s({0: replace(AHEAD, longest_pause_s=900.0)}, None) == CEILING_S
    assert limit_s({0: AHEAD}, 3.0) == 3.0


def test_a_limit_of_zero_disables_detection() -> None:
    assert find_hang({0: AHEAD, 1: BEHIND}, now=1e6, override_s=0.0) is None


progress = st.builds(
    RankProgress,
    step=st.integers(0, 5),
    point=st.sampled_from([point for point in Point if point is not Point.OUTSIDE]),
    count=st.integers(0, 2),
    at=st.floats(0, 100),
    longest_pause_s=st.floats(0, 10),
    own_s=st.floats(0, 1),
    stopped=st.booleans(),
    traced=st.booleans(),
)


@given(st.dictionaries(st.integers(0, 7), progress, min_size=2, max_size=8))
def test_the_rank_that_is_furthest_is_never_blamed_alone(found: dict[int, RankProgress]) -> None:
    hang = find_hang(found, now=1e6, override_s=1.0)
    if hang is None:
        return
    furthest = max(rank_progress.position for rank_progress in found.values())
    blamed = {found[rank].position for rank in hang.ranks if not found[rank].stopped}
    assert furthest not in blamed or len(hang.ranks) == len(found)


def test_a_survivor_that_does_not_release_its_groups_hangs() -> None:
    notified_at = {0: 100.0, 2: 125.0}
    assert find_unreleased(notified_at, now=100.0 + RELEASE_S) is None
    hang = find_unreleased(notified_at, now=101.0 + RELEASE_S)
    assert hang is not None
    assert (hang.ranks, hang.silent_s) == ((0,), RELEASE_S + 1.0)
    assert "did not release its process groups within 30.0 s of the fault report" in hang.reason
    assert find_unreleased(notified_at, now=103.0, override_s=2.0) is not None
    assert find_unreleased(notified_at, now=1e6, override_s=0.0) is None
    assert find_unreleased({}, now=1e6) is None


def test_a_survivor_that_reports_a_stuck_collective_is_not_waited_for() -> None:
    held = {1: "MainThread sleeps in torch.distributed.send"}
    hang = find_unreleased({0: 100.0, 1: 100.0}, now=101.5, held=held, override_s=0.0)
    assert hang is not None
    assert (hang.ranks, hang.silent_s) == ((1,), 1.5)
    assert (
        hang.reason == "did not release its process groups after the fault: MainThread sleeps in torch.distributed.send"
    )
    # It has released its groups meanwhile, or was replaced.
    assert find_unreleased({0: 100.0}, now=101.5, held=held) is None


def test_a_thread_that_sleeps_without_any_work_is_stuck() -> None:
    asleep, awake = (
        SleepingThread("MainThread", "torch.distributed.send", 7),
        SleepingThread("MainThread", "torch.distributed.send", 8),
    )
    since = unchanged_since({}, {1: asleep, 2: asleep}, 10.0)
    assert find_stuck_collective(since, 10.0 + STUCK_COLLECTIVE_S) is None
    since = unchanged_since(since, {1: asleep, 2: awake}, 10.4)
    assert since == {1: (asleep, 10.0), 2: (awake, 10.4)}
    since = unchanged_since(since, {2: awake}, 10.8)
    assert find_stuck_collective(since, 10.8) is None
    assert find_stuck_collective(since, 11.0) == (
        "MainThread sleeps in torch.distributed.send for 0.6 s, with no connection left to end it"
    )


READY = RegroupStatus(
    coming={},
    unreleased={},
    ready={0: 100.0, 1: 90.0, 2: 95.0},
    created={},
    regrouped=(),
    startup_s=3.0,
    is_whole=True,
)
OVERDUE = 100.0 + REGROUP_S + 1.0
ALL_WAIT = {0: True, 1: True, 2: True}


def test_ranks_that_prevent_a_regroup_are_late() -> None:
    regrouped = replace(READY, ready={1: 100.0}, regrouped=(0, 2))
    found = {
        "others have regrouped": find_late(regrouped, now=OVERDUE),
        "busy": find_late(READY, now=OVERDUE, waits={**ALL_WAIT, 1: False}),
    }
    assert {name: hang.ranks for name, hang in found.items() if hang is not None} == dict.fromkeys(found, (1,))
    everyone = find_late(READY, now=OVERDUE, waits=ALL_WAIT)
    assert everyone is not None and everyone.ranks == (0, 1, 2)
    assert f"have not regrouped within {REGROUP_S} s" in everyone.reason


@pytest.mark.parametrize(
    ("created", "late"),
    [
        ({0: (2, 101.0), 1: (1, 101.0), 2: (2, 101.0)}, (1,)),
        ({0: (1, 101.0), 2: (1, 102.0)}, (1,)),
        ({0: (2, 101.0), 1: (1, 101.0)}, (1, 2)),
        # All wait for a rank that none of them names.
        ({0: (1, 101.0), 1: (1, 101.0), 2: (1, 101.0)}, None),
    ],
    ids=str,
)
def test_ranks_that_have_not_created_a_group_are_late(
    created: dict[int, tuple[int, float]], late: tuple[int, ...] | None
) -> None:
    status = replace(READY, created=created)
    found = find_late(status, now=101.0 + GROUP_S + 0.5, waits=ALL_WAIT)
    assert (found and found.ranks) == late
    assert find_late(status, now=101.0 + GROUP_S - 0.5, waits=ALL_WAIT) is None
    assert find_late(replace(status, is_whole=False), now=101.0 + GROUP_S + 0.5) is None
    assert find_late(replace(status, coming={3: 100.0}), now=101.0 + GROUP_S + 0.5) is None


@pytest.mark.parametrize("why", ["in time", "a process comes", "ranks elsewhere", "not asked", "switched off"])
def test_a_regroup_that_is_not_late_yet(why: str) -> None:
    status = {"a process comes": replace(READY, coming={3: 100.0}), "ranks elsewhere": replace(READY, is_whole=False)}
    now = 100.0 + REGROUP_S if why == "in time" else OVERDUE - 1.5 if why == "a process comes" else OVERDUE
    waits = {**ALL_WAIT, 2: None} if why == "not asked" else ALL_WAIT
    override_s = 0.0 if why == "switched off" else None
    assert find_late(status.get(why, READY), now=now, override_s=override_s, waits=waits) is None


@pytest.mark.parametrize(
    "where",
    [
        {"coming": {2: 100.0}},
        {"unreleased": {2: 100.0}},
        {"ready": {0: 100.0, 1: 90.0, 2: 95.0}},
    ],
    ids=lambda where: next(iter(where)),
)
def test_a_rank_that_a_signal_has_stopped_is_late_wherever_it_is(where: dict[str, dict[int, float]]) -> None:
    status = replace(READY, ready={0: 100.0, 1: 90.0})
    status = replace(status, **where)  # type: ignore[arg-type]
    found = find_late(status, now=101.0 + STOPPED_S, stopped={2: 100.5})
    assert found is not None and found.ranks == (2,)
    assert found.reason == f"stopped by a signal for {STOPPED_S + 0.5} s while the ranks recover"
    assert find_late(status, now=100.0 + STOPPED_S, stopped={2: 100.5}) is None
    assert find_late(status, now=103.0, stopped={2: 100.5}, override_s=2.0) is not None
    everyone = dict.fromkeys(range(3), 50.0)
    assert find_late(status, now=101.0 + STOPPED_S, stopped=everyone) is None, "the job is suspended"
    assert find_late(status, now=101.0 + STOPPED_S, stopped={2: 50.0}, override_s=0.0) is None


def test_a_stopped_rank_that_takes_part_in_no_regroup_is_not_late() -> None:
    assert find_late(replace(READY, ready={}, regrouped=(0, 1)), now=1e6, stopped={2: 1.0}) is None


def test_a_regroup_ends_even_if_no_rank_says_what_it_does() -> None:
    unknown = dict.fromkeys(ALL_WAIT)
    assert find_late(READY, now=OVERDUE, waits=unknown) is None
    found = find_late(READY, now=OVERDUE + REGROUP_S, waits=unknown)
    assert found is not None and found.ranks == (0, 1, 2)


def test_a_new_process_has_longer_than_the_first_ones_took() -> None:
    status = replace(READY, coming={3: 100.0})
    hang = find_late(status, now=100.0 + STARTUP_S + 1.0)
    assert hang is not None and hang.ranks == (3,)
    assert "did not reach fit within 60.0 s; the first processes took 3.0 s" in hang.reason
    assert find_late(replace(status, startup_s=30.0), now=100.0 + STARTUP_S + 1.0) is None


def test_the_limit_of_a_user_never_blames_all_ranks() -> None:
    assert find_late(READY, now=103.0, override_s=2.0, waits=ALL_WAIT) is None
