"""Nodes that stay and nodes that join: a fault and the end of the run settle together which of them regroup."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

from lightning_ckptless.membership.agent.fault_log import FaultLog
from lightning_ckptless.membership.agent.positions import Positions
from lightning_ckptless.membership.agent.reconfiguration import Reconfiguration
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.protocol.reconfiguration import NodeStatus, plan_move
from tests.membership.agent.test_in_place import in_place_at

CLOCK = Clock(lambda: 0.0, lambda: 0.0)
STAYS = [NodeStatus(trains=True, node_rank=node, world_size=2) for node in range(2)]


@pytest.fixture
def nodes() -> list[Reconfiguration]:
    """The nodes of a round: 0 and 1 stay, 2 joins them."""
    return nodes_of([*STAYS, NodeStatus()])


def nodes_of(statuses: list[NodeStatus]) -> list[Reconfiguration]:
    store, plan = HashStore(), plan_move(statuses)

    def reconfiguration(node: int) -> Reconfiguration:
        in_place = in_place_at(lambda: 0.0)
        faults = FaultLog(f"node{node}", [], print, lambda: "", CLOCK)
        positions = Positions(PrefixStore("positions", store), node, plan.stay, {0: node}, print)
        made = Reconfiguration(plan, node, store, in_place, faults, positions)
        if made.stays:
            made.keep_workers(2)
        return made

    return [reconfiguration(node) for node in range(len(statuses))]


@pytest.mark.parametrize("fault", range(3))
def test_no_worker_leaves_once_a_fault_brings_all_together(fault: int, nodes: list[Reconfiguration]) -> None:
    assert nodes[fault].obstacle() == ""
    assert not nodes[0].may_end() and not nodes[1].may_end()
    assert not nodes[2].is_too_late
    assert [node.obstacle() for node in nodes] == [""] * 3


@pytest.mark.parametrize("fault", range(3))
def test_no_regrouping_is_opened_once_workers_may_leave(fault: int, nodes: list[Reconfiguration]) -> None:
    assert nodes[0].may_end() and nodes[1].may_end()
    assert (
        nodes[fault].obstacle()
        == "workers that stayed have been allowed to leave the training loop after the last step"
    )
    assert [node.is_too_late for node in nodes] == [False, False, True]


def test_no_worker_leaves_before_those_of_a_node_that_restarts_them_are_back() -> None:
    first, second = nodes_of([replace(STAYS[0], trains=False), STAYS[1]])
    assert not second.may_end()
    assert not first.is_too_late
    assert second.obstacle() == first.obstacle() == ""
