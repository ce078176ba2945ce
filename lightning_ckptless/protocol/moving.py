"""The nodes have met anew: do those that train stay, and meet the new ones in the loop, or do all start together?

Every agent says of its node what it has; all read the same, so all decide alike:

| Nodes | And | Then |
|---|---|---|
| none trains | | all start together |
| one trains, and cannot go on in another world | | all start together |
| some train, of different worlds | | all start together |
| some train, but not the first one | rank 0 alone writes log files and checkpoints: its node must know them | all start together |
| some train, the first one among them, which had not rank 0 before | no other one trains | all start together |
| some train, the first one among them, which had not rank 0 before | rank 0 has to be a process that has written no file | its workers start anew, those of the others stay |
| some train, the first one with rank 0, as before | | those stay, and wait for the others at the loop |
"""  # noqa: E501 - a row of a table is a line

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Standing:
    """What a node brings to a round of the rendezvous.

    Args:
        trains: whether all its workers are in the training loop, and run.
        first_rank: rank of its first worker in the round before; -1 where it had none.
        world_size: number of ranks in the round before; 0 where it had none.
        number: newest regrouping that it knows.
        obstacle: why a worker of it cannot go on in another world; empty where it can.
        lost_at: wall clock of the last sign of a node that it has found lost, seconds since the epoch; 0 for none.
    """

    trains: bool = False
    first_rank: int = -1
    world_size: int = 0
    number: int = 0
    obstacle: str = ""
    lost_at: float = 0.0


@dataclass(frozen=True, slots=True)
class MovePlan:
    """Who stays.

    Args:
        stay: nodes, by their number in the new round, whose workers stay in the loop; none where all start together.
        come: nodes whose workers are started, and come to the loop alone.
        number: regrouping under which they meet there.
        reason: why, in a sentence.
        lost_at: wall clock of the last sign of the nodes that are lost; 0 where none is known to be.
    """

    stay: tuple[int, ...]
    come: tuple[int, ...]
    number: int
    reason: str
    lost_at: float = 0.0


def plan_move(standings: Sequence[Standing]) -> MovePlan:
    """Decide who stays.

    Args:
        standings: of all nodes, in the order of the new round.
    """
    everyone = tuple(range(len(standings)))
    train = tuple(node for node in everyone if standings[node].trains)
    number = max(standing.number for standing in standings) + 1
    lost_at = min((standing.lost_at for standing in standings if standing.lost_at), default=0.0)
    if (why := _why_together(standings, train)) is not None:
        return MovePlan((), everyone, number, f"all {len(everyone)} nodes start together: {why}", lost_at)
    is_first_anew = standings[0].first_rank != 0
    stay = train[1:] if is_first_anew else train
    come = tuple(node for node in everyone if node not in train)
    reason = f"the workers of {len(stay)} of {len(everyone)} nodes stay"
    if come:
        reason += f", node {', '.join(map(str, come))} comes to them"
    if is_first_anew:
        reason += ", those of node 0 start anew: rank 0, which writes log files and checkpoints, was on another node"
        come = (0, *come)
    return MovePlan(stay, come, number, reason, lost_at)


def _why_together(standings: Sequence[Standing], train: Sequence[int]) -> str | None:
    if not train:
        return "none has workers that train"
    for node in train:
        if standings[node].obstacle:
            return f"node {node} cannot go on in another world: {standings[node].obstacle}"
    if len({standings[node].world_size for node in train}) > 1:
        return "they come from different worlds"
    if train[0] != 0:
        return "rank 0, which writes log files and checkpoints, is on a node that does not train yet"
    if train == (0,) and standings[0].first_rank != 0:
        return "rank 0, which writes log files and checkpoints, was on another node, and no other one trains"
    return None
