"""Whether work is moved off a rank or a node."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.draining import (
    DrainAction,
    NodeSituation,
    RankSituation,
    plan_node_drain,
    plan_rank_drain,
)

RANK = RankSituation(rank=2, world_size=4, under_way=frozenset(), in_place=True, obstacle=None, standbys=0)
NODE = NodeSituation(
    node=1, nodes=4, least_nodes=2, spare_nodes=0, leaving="", hosts=False, endpoints=1, sole_shards=(), obstacle=""
)


def test_a_rank_is_replaced_by_a_process_that_is_ready_or_started() -> None:
    plan = plan_rank_drain(RANK)
    assert (plan.action, plan.reason) == (
        DrainAction.REPLACE,
        "draining rank 2: a standby is started first, and 3 of 4 ranks stay",
    )
    assert "a standby is ready" in plan_rank_drain(replace(RANK, standbys=1)).reason


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rank": 4}, "rank 4 is not drained: the run has 4 ranks, numbered from 0"),
        ({"under_way": frozenset({2})}, "it is already being drained"),
        ({"rank": 0, "world_size": 1}, "it is the only rank of the run"),
        ({"in_place": False}, "recovery in place is disabled"),
        ({"obstacle": "the script has a group"}, "no process could take its place: the script has a group"),
    ],
)
def test_a_rank_is_not_drained(changes: dict[str, Any], expected: str) -> None:
    plan = plan_rank_drain(replace(RANK, **changes))
    assert plan.action is DrainAction.REFUSE
    assert expected in plan.reason


def test_the_work_of_a_node_moves_to_a_waiting_one_or_to_the_others() -> None:
    assert plan_node_drain(replace(NODE, spare_nodes=1)).action is DrainAction.REPLACE
    plan = plan_node_drain(NODE)
    assert plan.action is DrainAction.SHRINK
    assert "continues on 3 of 4 nodes; it needs 2" in plan.reason


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"node": 4}, "node 4 is not drained: the run has 4 nodes, numbered from 0"),
        ({"node": 0, "nodes": 1, "least_nodes": 1, "spare_nodes": 2}, "it is the only node of the run"),
        ({"leaving": "draining node 3"}, "another node is being drained (draining node 3)"),
        ({"hosts": True}, "its loss ends the run: restart it with several endpoints in --rdzv-endpoint"),
        (
            {"hosts": True, "endpoints": 2},
            "once it is gone, they use the next endpoint, and all workers are relaunched",
        ),
        ({"sole_shards": (5, 3)}, "no other node has a copy of shard 3"),
        ({"obstacle": "manual optimization"}, "could not continue without it: manual optimization"),
        ({"least_nodes": 4}, "4 - 1 + 0 spare = 3 nodes would remain, but the run needs 4"),
    ],
)
def test_a_node_is_not_drained(changes: dict[str, Any], expected: str) -> None:
    plan = plan_node_drain(replace(NODE, **changes))
    assert plan.action is DrainAction.REFUSE
    assert expected in plan.reason


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
def test_a_run_keeps_as_many_nodes_as_it_needs(nodes: int, least: int, spare: int) -> None:
    plan = plan_node_drain(replace(NODE, node=0, nodes=nodes, least_nodes=least, spare_nodes=spare))
    is_possible = nodes > 1 and nodes - 1 + spare >= least
    assert (plan.action is not DrainAction.REFUSE) == is_possible
    assert not is_possible or (plan.action is DrainAction.REPLACE) == (spare > 0)
    if plan.action is DrainAction.SHRINK:
        left, needed = map(int, re.findall(r"(\d+) of \d+ nodes; it needs (\d+)", plan.reason)[0])
        assert left >= needed
