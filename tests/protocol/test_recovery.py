"""The kind of recovery, and the states of a worker."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.errors import ProtocolError
from lightning_ckptless.protocol.crash_loop import Stage
from lightning_ckptless.protocol.recovery import (
    TRIES_IN_PLACE,
    WORKER_TRANSITIONS,
    Rung,
    Situation,
    WorkerEvent,
    WorkerState,
    next_state,
    plan_recovery,
)

USUAL = Situation((1,), 4, None, None, in_place=True, obstacle=None, outside={}, tries=0)


@pytest.mark.parametrize(
    ("now", "rung", "reason"),
    [
        (USUAL, Rung.IN_PLACE, "recovering in place: 3 of 4 ranks survived, replacing rank 1"),
        (
            replace(USUAL, lost=(1, 3)),
            Rung.IN_PLACE,
            "recovering in place: 2 of 4 ranks survived, replacing ranks 1, 3",
        ),
        (replace(USUAL, final="its own bug"), Rung.END, "not relaunched: its own bug"),
        (replace(USUAL, exhausted="no recovery is left"), Rung.END, "no recovery is left"),
        (replace(USUAL, in_place=False), Rung.RELAUNCH, "disabled"),
        (replace(USUAL, obstacle="it has a second fit"), Rung.RELAUNCH, "it has a second fit"),
        (replace(USUAL, lost=(0, 1, 2, 3)), Rung.RELAUNCH, "none of 4 ranks survived"),
        (replace(USUAL, outside={0: Stage.BEFORE}), Rung.RELAUNCH, "not in place: rank 0 is before fit"),
        (
            replace(USUAL, outside={1: Stage.PAST, 0: Stage.PAST, 3: Stage.INSIDE}),
            Rung.RELAUNCH,
            "not in place: rank 3 is in fit, outside its training loop, ranks 0, 1 are after fit",
        ),
        (replace(USUAL, tries=TRIES_IN_PLACE), Rung.RELAUNCH, "tried 2 times"),
    ],
)
def test_each_row_of_the_table(now: Situation, rung: Rung, reason: str) -> None:
    plan = plan_recovery(now)
    assert plan.rung is rung
    assert reason in plan.reason


situations = st.builds(
    Situation,
    lost=st.sets(st.integers(0, 7), min_size=1).map(lambda ranks: tuple(sorted(ranks))),
    world_size=st.just(8),
    final=st.none() | st.just("a bug"),
    exhausted=st.none() | st.just("too many"),
    in_place=st.booleans(),
    obstacle=st.none() | st.just("something"),
    outside=st.dictionaries(st.integers(0, 7), st.sampled_from(Stage)),
    tries=st.integers(0, 4),
)


@given(situations)
def test_recovery_in_place_needs_every_condition_and_a_final_fault_ends_the_run(now: Situation) -> None:
    plan = plan_recovery(now)
    assert plan.reason
    assert (plan.rung is Rung.END) == (now.final is not None or now.exhausted is not None)
    if plan.rung is Rung.IN_PLACE:
        assert now.in_place and now.obstacle is None and not now.outside and len(now.lost) < now.world_size


def test_a_worker_that_survives_a_fault_trains_again() -> None:
    state = WorkerState.OUTSIDE
    for event in ("enter", "fault", "assign", "join", "fault", "assign", "join", "restore", "leave"):
        state = next_state(state, WorkerEvent(event))
    assert state is WorkerState.OUTSIDE


@given(st.sampled_from(WorkerState), st.sampled_from(WorkerEvent))
def test_an_event_not_in_the_table_is_a_bug(state: WorkerState, event: WorkerEvent) -> None:
    if event in WORKER_TRANSITIONS[state]:
        assert next_state(state, event) is WORKER_TRANSITIONS[state][event]
    else:
        with pytest.raises(ProtocolError, match=f"a worker in state {state} received event {event}"):
            next_state(state, event)
