"""Which nodes keep their workers after a new rendezvous."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.reconfiguration import NodeStatus, plan_move, rank_nodes

TRAINS = NodeStatus(trains=True, node_rank=0, world_size=3, number=2)
SECOND, THIRD = replace(TRAINS, node_rank=1), replace(TRAINS, node_rank=2)
NEW = NodeStatus()
statuses = st.lists(
    st.builds(
        NodeStatus,
        trains=st.booleans(),
        ends=st.booleans(),
        node_rank=st.integers(-1, 5),
        world_size=st.integers(0, 4),
        number=st.integers(0, 5),
        obstacle=st.sampled_from(["", "", "its mesh was flattened"]),
    ),
    min_size=1,
    max_size=5,
)


@given(statuses)
def test_every_node_stays_or_joins_under_a_new_number(nodes: list[NodeStatus]) -> None:
    plan = plan_move(nodes)
    assert sorted([*plan.stay, *plan.come]) == sorted(plan.node_ranks) == list(range(len(nodes)))
    assert all(plan.number > node.number for node in nodes)


@given(statuses)
def test_all_training_nodes_stay_except_one_that_takes_node_rank_0(nodes: list[NodeStatus]) -> None:
    plan = plan_move(nodes)
    by_rank = dict(zip(plan.node_ranks, nodes, strict=True))
    train = {rank for rank, node in by_rank.items() if node.trains}
    if plan.stay:
        restarts_first = by_rank[0].trains and by_rank[0].node_rank != 0
        assert set(plan.stay) == (train - {0} if restarts_first else train)
        assert not any(by_rank[rank].obstacle for rank in train)


@given(statuses)
def test_nodes_keep_their_ranks_where_possible(nodes: list[NodeStatus]) -> None:
    given_ranks = rank_nodes(nodes)
    for node, rank in zip(nodes, given_ranks, strict=True):
        rivals = [other for other in nodes if other is not node and other.node_rank == node.node_rank]
        if 0 <= node.node_rank < len(nodes) and not rivals:
            assert rank == node.node_rank or (rank == 0 and all(other.node_rank for other in nodes))


@given(statuses)
def test_a_node_that_was_training_has_rank_0(nodes: list[NodeStatus]) -> None:
    first = nodes[rank_nodes(nodes).index(0)]
    assert first.trains or first.node_rank == 0 or not any(node.trains for node in nodes)


@given(st.integers(1, 5))
def test_new_nodes_are_ranked_in_order(count: int) -> None:
    assert rank_nodes([NEW] * count) == tuple(range(count))


def test_survivors_stay_and_a_new_node_joins() -> None:
    plan = plan_move([TRAINS, SECOND, NEW])
    assert (plan.stay, plan.come, plan.number) == ((0, 1), (2,), 3)
    assert plan.reason == "the workers of 2 of 3 nodes stay, node 2 joins them"


def test_a_new_node_takes_the_free_rank() -> None:
    plan = plan_move([NEW, TRAINS, THIRD])
    assert (plan.node_ranks, plan.stay, plan.come) == ((1, 0, 2), (0, 2), (1,))


def test_a_remaining_node_takes_the_rank_of_a_lost_one() -> None:
    plan = plan_move([TRAINS, THIRD])
    assert (plan.node_ranks, plan.stay) == ((0, 1), (0, 1))


def test_a_node_that_takes_rank_0_restarts_its_workers() -> None:
    plan = plan_move([SECOND, THIRD])
    assert (plan.node_ranks, plan.stay, plan.come) == ((1, 0), (1,), (0,))
    assert plan.reason == (
        "the workers of 1 of 2 nodes stay, those of node 0 restart: rank 0, which writes log files and checkpoints, "
        "was on another node"
    )


def test_the_run_does_not_end_without_nodes_that_restart_their_workers() -> None:
    assert plan_move([TRAINS, SECOND, NEW]).restart == ()
    assert plan_move([SECOND, THIRD, NEW]).restart == (0,)
    assert plan_move([TRAINS, replace(SECOND, trains=False), NEW]).restart == (1,)


def test_the_node_of_rank_0_that_has_lost_its_workers_keeps_its_rank() -> None:
    plan = plan_move([replace(TRAINS, trains=False), SECOND])
    assert (plan.node_ranks, plan.stay, plan.come) == ((0, 1), (1,), (0,))


@pytest.mark.parametrize("nodes", [[SECOND], [NEW, SECOND]], ids=["alone", "new node"])
def test_a_single_training_node_that_takes_rank_0_starts_together_with_all(nodes: list[NodeStatus]) -> None:
    plan = plan_move(nodes)
    assert plan.stay == ()
    assert "rank 0, which writes log files" in plan.reason


def test_an_obstacle_on_one_node_makes_all_start_together() -> None:
    plan = plan_move([TRAINS, replace(SECOND, obstacle="its mesh was flattened")])
    assert plan.stay == ()
    assert (
        plan.reason
        == "all 2 nodes start together: node 1 cannot continue at another world size: its mesh was flattened"
    )


def test_nodes_of_different_world_sizes_start_together() -> None:
    assert "different world sizes" in plan_move([TRAINS, replace(SECOND, world_size=2)]).reason


def test_no_workers_stay_that_are_about_to_leave_like_those_of_another_node() -> None:
    plan = plan_move([TRAINS, replace(SECOND, trains=False, ends=True), NEW])
    assert (plan.stay, plan.come) == ((), (0, 1, 2))
    assert plan.reason == (
        "all 3 nodes start together: workers of node 1 had been allowed to leave the training loop after the last step"
    )


def test_at_the_first_start_all_start_together() -> None:
    assert plan_move([NEW, NEW]).reason == "all 2 nodes start together: no node has workers in training"
