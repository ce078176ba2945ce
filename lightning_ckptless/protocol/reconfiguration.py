"""Reconfiguration: after a new rendezvous, decide which nodes keep their workers and which start new ones.

Every agent publishes the status of its node. All agents read the same statuses and so reach the same decision. A node
keeps its node rank, and with it the ranks of its workers, if that rank exists in the new round.

| Nodes | And | Then |
|---|---|---|
| none is training | | all start together |
| some are training, and one of them cannot continue at another world size | | all start together |
| some are training, from different world sizes | | all start together |
| some are training | workers of another one have left the training loop after the last step, or may leave it | all start together |
| one is training, and it has to take node rank 0 | rank 0 writes log files and checkpoints, so it has to be a process that has not written any | all start together |
| several are training, and one of them has to take node rank 0 | | its workers are restarted, those of the others stay |
| some are training, and the node of rank 0 remains | others have no workers yet, or lost theirs | those that are training stay, and wait for the others in the training loop |
"""  # noqa: E501 - a row of a table is a line

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """The status of a node at a rendezvous round.

    Args:
        trains: whether all its workers are running and in the training loop.
        ends: whether workers of it have left the training loop after the last step, or may leave it.
        node_rank: its node rank in the previous round; -1 if it had none.
        world_size: number of ranks in the previous round; 0 if there was none.
        number: number of the newest regrouping that it knows.
        obstacle: why one of its workers cannot continue at another world size; empty if all can.
        lost_at: wall clock of the last heartbeat of a node that it found to be lost, in seconds since the epoch; 0 if
        none.
    """

    trains: bool = False
    ends: bool = False
    node_rank: int = -1
    world_size: int = 0
    number: int = 0
    obstacle: str = ""
    lost_at: float = 0.0


@dataclass(frozen=True, slots=True)
class MovePlan:
    """Which nodes keep their workers.

    Args:
        node_ranks: node rank of each node, in the order of their statuses.
        stay: node ranks whose workers stay in the training loop; empty if all nodes start together.
        come: node ranks whose workers are started and join the training loop.
        number: number of their regrouping.
        reason: explanation, one sentence.
        lost_at: wall clock of the last heartbeat of the lost nodes, in seconds since the epoch; 0 if none is lost.
        restart: those of `come` that had workers in the previous round. The run does not end without them, whereas it
            may end before new nodes have joined it.
    """

    node_ranks: tuple[int, ...]
    stay: tuple[int, ...]
    come: tuple[int, ...]
    number: int
    reason: str
    lost_at: float = 0.0
    restart: tuple[int, ...] = ()


def plan_move(statuses: Sequence[NodeStatus]) -> MovePlan:
    """Decide which nodes keep their workers.

    Args:
        statuses: statuses of all nodes, in the same order on every node.
    """
    node_ranks = rank_nodes(statuses)
    by_rank = dict(zip(node_ranks, statuses, strict=True))
    train = [rank for rank in sorted(by_rank) if by_rank[rank].trains]
    number = max(status.number for status in statuses) + 1
    lost_at = min((status.lost_at for status in statuses if status.lost_at), default=0.0)
    restarts_first = by_rank[0].trains and by_rank[0].node_rank != 0
    stay = tuple(rank for rank in train if rank or not restarts_first)
    if (why := _why_together(by_rank, train, stay)) is not None:
        together = f"all {len(statuses)} nodes start together: {why}"
        return MovePlan(node_ranks, (), tuple(sorted(by_rank)), number, together, lost_at)
    come = tuple(rank for rank in sorted(by_rank) if rank not in stay)
    new = [str(rank) for rank in come if rank or not restarts_first]
    reason = f"the workers of {len(stay)} of {len(statuses)} nodes stay"
    if new:
        reason += f", node{'s' if len(new) > 1 else ''} {', '.join(new)} join{'' if len(new) > 1 else 's'} them"
    if restarts_first:
        reason += ", those of node 0 restart: rank 0, which writes log files and checkpoints, was on another node"
    restart = tuple(rank for rank in come if by_rank[rank].node_rank >= 0)
    return MovePlan(node_ranks, stay, come, number, reason, lost_at, restart)


def rank_nodes(statuses: Sequence[NodeStatus]) -> tuple[int, ...]:
    """Assign node ranks. A node keeps its previous rank where possible.

    Rank 0 goes to a node that was training, because it knows which log files exist.

    Args:
        statuses: statuses of all nodes, in the same order on every node.
    """
    nodes = range(len(statuses))
    given: dict[int, int] = {}
    for node in sorted(nodes, key=lambda node: not statuses[node].trains):
        wanted = statuses[node].node_rank
        if wanted in nodes and wanted not in given.values():
            given[node] = wanted
    if 0 not in given.values() and (train := [node for node in nodes if statuses[node].trains]):
        given[next((node for node in train if node not in given), train[-1])] = 0
    free = iter([rank for rank in nodes if rank not in given.values()])
    for node in sorted(nodes, key=lambda node: not statuses[node].trains):
        if node not in given:
            given[node] = next(free)
    return tuple(given[node] for node in nodes)


def _why_together(by_rank: Mapping[int, NodeStatus], train: Sequence[int], stay: Sequence[int]) -> str | None:
    if not train:
        return "no node has workers in training"
    for rank in train:
        if by_rank[rank].obstacle:
            return f"node {rank} cannot continue at another world size: {by_rank[rank].obstacle}"
    if ending := [rank for rank in sorted(by_rank) if by_rank[rank].ends]:
        # Their new processes would come too late for those that stay, which are about to leave as well.
        return f"workers of node {ending[0]} had been allowed to leave the training loop after the last step"
    if len({by_rank[rank].world_size for rank in train}) > 1:
        return "they come from different world sizes"
    if not stay:
        return (
            "rank 0, which writes log files and checkpoints, was on another node, and only one node has workers in "
            "training"
        )
    return None
