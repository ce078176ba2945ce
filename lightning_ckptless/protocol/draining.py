"""Draining: whether work is moved off a rank, and how.

A drained rank is handed over to a process that is made ready first. All ranks stop at a committed step, the drained
process exits with code 0, and the new one takes its place, so no step is replayed. The first row that applies decides:

| Asked for | And | Then |
|---|---|---|
| a rank that the run does not have | | refuse |
| a rank that is drained already | | refuse |
| the only rank | no other process could keep its state meanwhile | refuse |
| a rank | recovery in place is disabled | refuse |
| a rank | a worker cannot be joined by a new process | refuse |
| a rank | | replace |
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class DrainAction(StrEnum):
    """What follows from a request to drain a rank."""

    REPLACE = "replace"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class DrainSituation:
    """What an agent knows when a rank is to be drained.

    Args:
        rank: the rank.
        world_size: number of ranks.
        under_way: ranks of this node that are drained already.
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
class DrainPlan:
    """What is done, and the reason for it."""

    action: DrainAction
    reason: str


def plan_drain(now: DrainSituation) -> DrainPlan:
    """Decide what follows from a request to drain a rank."""
    if why_not := _why_not(now):
        return DrainPlan(DrainAction.REFUSE, f"rank {now.rank} is not drained: {why_not}")
    ready = "a standby is ready" if now.standbys else "a standby is started first"
    others = now.world_size - 1
    return DrainPlan(
        DrainAction.REPLACE, f"draining rank {now.rank}: {ready}, and {others} of {now.world_size} ranks stay"
    )


def _why_not(now: DrainSituation) -> str:
    if not 0 <= now.rank < now.world_size:
        return f"the run has {now.world_size} ranks, 0 to {now.world_size - 1}"
    if now.rank in now.under_way:
        return "it is being drained already"
    if now.world_size == 1:
        return "it is the only rank of the run, and no other rank keeps its state; end the run with SIGTERM instead"
    if not now.in_place:
        return "recovery in place is disabled, so no process could take its place; enable it with `in_place`"
    if now.obstacle is not None:
        return f"no process could take its place: {now.obstacle}"
    return ""
