"""Who stays when the nodes have met anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.moving import Standing, plan_move

TRAINS = Standing(trains=True, first_rank=0, world_size=3, number=2)
standings = st.lists(
    st.builds(
        Standing,
        trains=st.booleans(),
        first_rank=st.integers(-1, 3),
        world_size=st.integers(0, 4),
        number=st.integers(0, 5),
        obstacle=st.sampled_from(["", "", "a sharded mesh"]),
    ),
    min_size=1,
    max_size=5,
)


@given(standings)
def test_every_node_stays_or_comes_under_a_number_that_none_has_seen(nodes: list[Standing]) -> None:
    plan = plan_move(nodes)
    assert sorted([*plan.stay, *plan.come]) == list(range(len(nodes)))
    assert all(plan.number > node.number for node in nodes)


@given(standings)
def test_only_those_stay_that_train_and_all_of_them_but_for_a_new_rank_0(nodes: list[Standing]) -> None:
    plan = plan_move(nodes)
    train = [node for node, standing in enumerate(nodes) if standing.trains]
    if plan.stay:
        assert train == sorted({0, *plan.stay})
        assert (0 in plan.stay) == (nodes[0].first_rank == 0)
        assert not any(nodes[node].obstacle for node in train)


def test_survivors_stay_and_a_new_node_comes() -> None:
    plan = plan_move([TRAINS, replace(TRAINS, first_rank=1), Standing()])
    assert (plan.stay, plan.come, plan.number) == ((0, 1), (2,), 3)
    assert plan.reason == "the workers of 2 of 3 nodes stay, node 2 comes to them"


def test_a_node_that_becomes_the_writer_of_logs_starts_anew() -> None:
    plan = plan_move([replace(TRAINS, first_rank=1), replace(TRAINS, first_rank=2), Standing()])
    assert (plan.stay, plan.come) == ((1,), (0, 2))
    assert plan.reason == (
        "the workers of 1 of 3 nodes stay, node 2 comes to them, those of node 0 start anew: rank 0, which writes log "
        "files and checkpoints, was on another node"
    )


@pytest.mark.parametrize("others", [[replace(TRAINS, first_rank=1)], [Standing(), TRAINS]], ids=["alone", "newcomer"])
def test_without_a_node_that_knows_the_log_files_all_start_together(others: list[Standing]) -> None:
    plan = plan_move(others)
    assert plan.stay == ()
    assert "rank 0, which writes log files" in plan.reason


def test_one_that_cannot_makes_all_start_together() -> None:
    plan = plan_move([TRAINS, replace(TRAINS, first_rank=1, obstacle="its mesh has a size")])
    assert plan.stay == ()
    assert plan.reason == "all 2 nodes start together: node 1 cannot go on in another world: its mesh has a size"


def test_a_first_start_is_together() -> None:
    assert plan_move([Standing(), Standing()]).reason == "all 2 nodes start together: none has workers that train"
