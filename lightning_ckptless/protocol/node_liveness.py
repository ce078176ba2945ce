"""Who is there: what an agent makes of the heartbeats of the others, and of the answers to its own.

A cable that is pulled resets no connection: whoever waits for an answer waits. So every agent counts up in the store of
the rendezvous, and looks whether those that it watches do.

| Seen | Then |
|---|---|
| this agent was stopped itself, and has not looked for half of the bound | nothing: it counts from now |
| no answer from the rendezvous for the bound | this node is cut off: its workers are stopped |
| a node that is watched has not counted for the bound and one interval | that node is lost: the others meet anew |
| | all are there |

A node that is cut off knows it one interval before the others take it for lost: its workers are gone when they go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bound:
    """How long silence is borne.

    Args:
        interval_s: from one heartbeat to the next.
        attempts: heartbeats that may be missing in a row.
    """

    interval_s: float
    attempts: int

    @property
    def cut_s(self) -> float:
        """Without an answer for longer, a node is cut off."""
        return self.interval_s * self.attempts

    @property
    def lost_s(self) -> float:
        """Without a heartbeat for longer, another node is lost."""
        return self.cut_s + self.interval_s

    def __str__(self) -> str:
        return f"keep_alive_interval={self.interval_s:g} x keep_alive_max_attempt={self.attempts}"


@dataclass(frozen=True, slots=True)
class AllThere:
    """Nothing is to be done."""


@dataclass(frozen=True, slots=True)
class CutOff:
    """This node cannot reach the others.

    Args:
        reason: the finding in a sentence.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class NodesLost:
    """Others cannot be heard any more.

    Args:
        nodes: their numbers in the round of the rendezvous.
        reason: the finding in a sentence.
        silent_s: for how long, those that were silent for longest.
    """

    nodes: tuple[int, ...]
    reason: str
    silent_s: float = 0.0


Finding = AllThere | CutOff | NodesLost


@dataclass(frozen=True, slots=True)
class Liveness:
    """What an agent has seen so far; times are of one clock, in seconds.

    Args:
        looked_at: when this was looked at last.
        answered_at: when the rendezvous has answered last.
        heard_at: when each node that is watched has counted up last.
    """

    looked_at: float
    answered_at: float
    heard_at: Mapping[int, float]


def watched_by(node: int, nodes: int) -> tuple[int, ...]:
    """Whom a node watches: the next one, and the first, where the workers have their store.

    Whatever is lost, a living node stands before it in the circle, sees it and meets anew; the others follow that one.

    Args:
        node: its number in the round.
        nodes: how many there are.
    """
    return tuple(sorted({(node + 1) % nodes, 0} - {node}))


def judge(liveness: Liveness, bound: Bound, *, now: float, place: str) -> Finding:
    """What to make of what was seen.

    Args:
        liveness: what was seen.
        bound: how long silence is borne.
        now: on the clock of the liveness.
        place: where the rendezvous is, for the sentence.
    """
    if now - liveness.looked_at > bound.cut_s / 2:
        return AllThere()
    silent_s = now - liveness.answered_at
    if silent_s > bound.cut_s:
        return CutOff(
            f"the rendezvous at {place} has not answered for {silent_s:.1f} s, {bound.cut_s:g} s are borne ({bound})"
        )
    lost = {node: now - at for node, at in liveness.heard_at.items() if now - at > bound.lost_s}
    if not lost:
        return AllThere()
    names = ", ".join(str(node) for node in lost)
    return NodesLost(
        tuple(lost),
        f"node{'s' if len(lost) > 1 else ''} {names} of the round {'have' if len(lost) > 1 else 'has'} been silent "
        f"for {max(lost.values()):.1f} s, {bound.lost_s:g} s are borne ({bound}, and one interval)",
        max(lost.values()),
    )
