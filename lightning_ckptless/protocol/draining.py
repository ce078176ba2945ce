"""Draining: whether work is moved off a rank or a node, and how.

A drained rank is handed over to a process that is prepared first. All ranks stop at a committed step, the drained
process exits with code 0, and the new one takes its place, so no step is replayed. The work of a drained node moves to
a spare node, or to the other nodes. The first row that applies decides:

| To be drained | And | Then |
|---|---|---|
| a rank | the run does not have it | refuse |
| a rank | it is already being drained | refuse |
| a rank | it is the only one: no other process could keep its state | refuse |
| a rank | recovery in place is disabled, or a new process cannot join the others | refuse |
| a rank | | replace |
| a node | the run does not have it | refuse |
| a node | it is the only one | refuse |
| a node | another node is being drained | refuse |
| a node | it hosts the rendezvous, which the other nodes need | refuse |
| a node | no other node has a copy of some shards | refuse |
| a node | the workers cannot continue at another world size, or no process can join them | refuse |
| a node | too few nodes would remain | refuse |
| a node | there is a spare node | replace |
| a node | | shrink |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.protocol.wording import counted


class DrainAction(StrEnum):
    """What follows from a request to drain a rank or a node."""

    REPLACE = "replace"
    SHRINK = "shrink"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class RankSituation:
    """What an agent knows when it is asked to drain a rank.

    Args:
        rank: the rank.
        world_size: number of ranks.
        under_way: ranks of this node that are being drained.
        in_place: whether recovery in place is enabled.
        obstacle: why no new process could join the others; None if one can.
        standbys: processes that wait for a rank.
    """

    rank: int
    world_size: int
    under_way: frozenset[int]
    in_place: bool
    obstacle: str | None
    standbys: int


@dataclass(frozen=True, slots=True)
class NodeSituation:
    """What an agent knows when it is asked to drain its node.

    Args:
        node: number of the node.
        nodes: number of nodes.
        least_nodes: how many the run needs.
        spare_nodes: number of nodes that wait for a place.
        leaving: why another node is being drained; empty if none is.
        hosts: whether this node hosts the rendezvous.
        endpoints: how many rendezvous endpoints the run has.
        sole_shards: shards that no other node has a copy of.
        obstacle: why the workers cannot continue in another world; empty if they can.
    """

    node: int
    nodes: int
    least_nodes: int
    spare_nodes: int
    leaving: str
    hosts: bool
    endpoints: int
    sole_shards: Sequence[int]
    obstacle: str


@dataclass(frozen=True, slots=True)
class DrainPlan:
    """The decision and its reason."""

    action: DrainAction
    reason: str


def plan_rank_drain(now: RankSituation) -> DrainPlan:
    """Decide what follows from a request to drain a rank."""
    if why_not := _why_not_rank(now):
        return DrainPlan(DrainAction.REFUSE, f"rank {now.rank} is not drained: {why_not}")
    ready = "a standby is ready" if now.standbys > 0 else "a standby is started first"
    others = now.world_size - 1
    return DrainPlan(
        DrainAction.REPLACE, f"draining rank {now.rank}: {ready}, and {others} of {now.world_size} ranks stay"
    )


def _why_not_rank(now: RankSituation) -> str:
    if not 0 <= now.rank < now.world_size:
        return f"the run has {now.world_size} ranks, numbered from 0"
    if now.rank in now.under_way:
        return "it is already being drained"
    if now.world_size == 1:
        return "it is the only rank of the run, so no other process has its state; end the run with SIGTERM instead"
    if not now.in_place:
        return "recovery in place is disabled, so no process could take its place"
    if now.obstacle is not None:
        return f"no process could take its place: {now.obstacle}"
    return ""


def plan_node_drain(now: NodeSituation) -> DrainPlan:
    """Decide what follows from a request to drain a node."""
    if why_not := _why_not_node(now):
        return DrainPlan(DrainAction.REFUSE, f"node {now.node} is not drained: {why_not}")
    left = now.nodes - 1
    if now.spare_nodes:
        reason = f"draining node {now.node}: a spare node takes over its work, {left} of {now.nodes} nodes stay"
        return DrainPlan(DrainAction.REPLACE, reason)
    return DrainPlan(
        DrainAction.SHRINK,
        f"draining node {now.node}: there is no spare node, so the run continues on {left} of {now.nodes} nodes; it "
        f"needs {now.least_nodes}",
    )


def _why_not_node(now: NodeSituation) -> str:
    if not 0 <= now.node < now.nodes:
        return f"the run has {counted(now.nodes, 'node')}, numbered from 0"
    if now.nodes == 1:
        return "it is the only node of the run; end the run with SIGTERM instead"
    if now.leaving:
        return f"another node is being drained ({now.leaving}); retry when it has left"
    if now.hosts:
        return f"it hosts the rendezvous, without which the other nodes could not regroup in place; {_instead(now)}"
    if now.sole_shards:
        return f"no other node has a copy of shard {min(now.sole_shards)}; see `copies` and `failure_domain`"
    if now.obstacle:
        return f"the other workers could not continue without it: {now.obstacle}"
    left = now.nodes - 1 + now.spare_nodes
    if left < now.least_nodes:
        return (
            f"{now.nodes} - 1 + {now.spare_nodes} spare = {counted(left, 'node')} would remain, but the run needs "
            f"{now.least_nodes}; start an agent on another node first, or allow fewer with --nnodes MIN:MAX"
        )
    return ""


def _instead(now: NodeSituation) -> str:
    """What happens to a run that loses the host of its rendezvous, and what can be done about it."""
    if now.endpoints > 1:
        return (
            "once it is gone, they use the next endpoint, and all workers are relaunched from the newest version "
            "on the other nodes"
        )
    return (
        "its loss ends the run: restart it with several endpoints in --rdzv-endpoint, or with the rendezvous "
        "on a machine that stays"
    )
