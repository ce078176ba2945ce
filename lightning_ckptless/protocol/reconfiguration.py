"""The nodes have met anew: do those that train stay, and meet the new ones in the loop, or do all start together?

Every agent says of its node what it has; all read the same, so all decide alike. A node keeps its node rank, and with
it the ranks of its workers, wherever that is there in the new round.

| Nodes | And | Then |
|---|---|---|
| none trains | | all start together |
| one trains, and cannot go on in another world | | all start together |
| some train, of different worlds | | all start together |
| one trains, and has to become that of rank 0 | rank 0, which writes log files and checkpoints, has to be a process that has written none | all start together |
| more train, and one of them has to become that of rank 0 | | its workers start anew, those of the others stay |
| some train, and the node of rank 0 is still there | others have no workers yet, or have lost theirs | those that train stay, and wait for the others at the loop |
"""  # noqa: E501 - a row of a table is a line

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Standing:
    """What a node brings to a round of the rendezvous.

    Args:
        trains: whether all its workers are in the training loop, and run.
        node_rank: that of the round before; -1 where it had none.
        world_size: number of ranks in the round before; 0 where it had none.
        number: newest regrouping that it knows.
        obstacle: why a worker of it cannot go on in another world; empty where it can.
        lost_at: wall clock of the last sign of a node that it has found lost, seconds since the epoch; 0 for none.
    """

    trains: bool = False
    node_rank: int = -1
    world_size: int = 0
    number: int = 0
    obstacle: str = ""
    lost_at: float = 0.0


@dataclass(frozen=True, slots=True)
class MovePlan:
    """Who stays.

    Args:
        node_ranks: of the nodes, in the order in which they came.
        stay: node ranks of those whose workers stay in the loop; none where all start together.
        come: node ranks of those whose workers are started, and come to the loop alone.
        number: regrouping under which they meet there.
        reason: why, in a sentence.
        lost_at: wall clock of the last sign of the nodes that are lost; 0 where none is known to be.
    """

    node_ranks: tuple[int, ...]
    stay: tuple[int, ...]
    come: tuple[int, ...]
    number: int
    reason: str
    lost_at: float = 0.0


def plan_move(standings: Sequence[Standing]) -> MovePlan:
    """Decide who stays.

    Args:
        standings: of all nodes, in the same order for all of them.
    """
    node_ranks = rank_nodes(standings)
    by_rank = dict(zip(node_ranks, standings, strict=True))
    train = [rank for rank in sorted(by_rank) if by_rank[rank].trains]
    number = max(standing.number for standing in standings) + 1
    lost_at = min((standing.lost_at for standing in standings if standing.lost_at), default=0.0)
    is_first_anew = by_rank[0].trains and by_rank[0].node_rank != 0
    stay = tuple(rank for rank in train if rank or not is_first_anew)
    if (why := _why_together(by_rank, train, stay)) is not None:
        together = f"all {len(standings)} nodes start together: {why}"
        return MovePlan(node_ranks, (), tuple(sorted(by_rank)), number, together, lost_at)
    come = tuple(rank for rank in sorted(by_rank) if rank not in stay)
    new = [str(rank) for rank in come if rank or not is_first_anew]
    reason = f"the workers of {len(stay)} of {len(standings)} nodes stay"
    if new:
        reason += f", node {', '.join(new)} comes to them"
    if is_first_anew:
        reason += ", those of node 0 start anew: rank 0, which writes log files and checkpoints, was on another node"
    return MovePlan(node_ranks, stay, come, number, reason, lost_at)


def rank_nodes(standings: Sequence[Standing]) -> tuple[int, ...]:
    """Give every node its node rank: that which it had, wherever it can be.

    Rank 0 goes to a node that has trained, since it knows what log files there are.

    Args:
        standings: of all nodes, in the same order for all of them.
    """
    nodes = range(len(standings))
    given: dict[int, int] = {}
    for node in sorted(nodes, key=lambda node: not standings[node].trains):
        wanted = standings[node].node_rank
        if wanted in nodes and wanted not in given.values():
            given[node] = wanted
    if 0 not in given.values() and (train := [node for node in nodes if standings[node].trains]):
        given[next((node for node in train if node not in given), train[-1])] = 0
    free = iter([rank for rank in nodes if rank not in given.values()])
    for node in sorted(nodes, key=lambda node: not standings[node].trains):
        if node not in given:
            given[node] = next(free)
    return tuple(given[node] for node in nodes)


def _why_together(by_rank: Mapping[int, Standing], train: Sequence[int], stay: Sequence[int]) -> str | None:
    if not train:
        return "none has workers that train"
    for rank in train:
        if by_rank[rank].obstacle:
            return f"node {rank} cannot go on in another world: {by_rank[rank].obstacle}"
    if len({by_rank[rank].world_size for rank in train}) > 1:
        return "they come from different worlds"
    if not stay:
        return (
            "rank 0, which writes log files and checkpoints, was on another node, and only one has workers that train"
        )
    return None
