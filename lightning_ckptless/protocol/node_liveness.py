"""Node liveness: how an agent interprets the heartbeats of other agents and the answers to its own.

An unplugged cable resets no connection, so a peer that waits for an answer waits forever. Therefore every agent
increments a counter in the rendezvous store and checks the counters of the nodes that it watches.

| Seen | Then |
|---|---|
| this agent was suspended and has not checked for half of the limit | nothing: it starts counting again |
| no answer from the rendezvous for the limit | this node is cut off: its workers are stopped |
| no heartbeat from a watched node for the limit plus one interval | that node is lost: the other nodes re-rendezvous |
| | all nodes are alive |

A node that is cut off notices it one interval before the others consider it lost, so its workers have stopped before
the others continue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bound:
    """The longest tolerated silence.

    Args:
        interval_s: seconds between two heartbeats.
        attempts: number of consecutive heartbeats that may be missing.
    """

    interval_s: float
    attempts: int

    @property
    def cut_s(self) -> float:
        """A node that receives no answer for more than these seconds is cut off."""
        return self.interval_s * self.attempts

    @property
    def lost_s(self) -> float:
        """A node that sends no heartbeat for more than these seconds is lost."""
        return self.cut_s + self.interval_s

    def __str__(self) -> str:
        return f"keep_alive_interval={self.interval_s:g} x keep_alive_max_attempt={self.attempts}"


@dataclass(frozen=True, slots=True)
class AllAlive:
    """All nodes are alive."""


@dataclass(frozen=True, slots=True)
class CutOff:
    """This node cannot reach the rendezvous.

    Args:
        reason: explanation, one sentence.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class NodesLost:
    """Other nodes have stopped sending heartbeats.

    Args:
        nodes: their indices in the rendezvous round.
        reason: explanation, one sentence.
        silent_s: longest silence among them, in seconds.
    """

    nodes: tuple[int, ...]
    reason: str
    silent_s: float = 0.0


Finding = AllAlive | CutOff | NodesLost


@dataclass(frozen=True, slots=True)
class Liveness:
    """What an agent has observed so far; times are in seconds of one clock.

    Args:
        looked_at: when this agent last checked.
        answered_at: when the rendezvous last answered.
        heard_at: when each watched node last sent a heartbeat.
    """

    looked_at: float
    answered_at: float
    heard_at: Mapping[int, float]


def watched_by(node: int, nodes: int) -> tuple[int, ...]:
    """The nodes that a node watches: the next one, and the first one, which hosts the workers' store.

    The nodes watch each other in a circle, so whichever nodes are lost, a live node precedes them in the circle,
    notices it and re-rendezvouses. The others follow it.

    Args:
        node: index of the node in the round.
        nodes: number of nodes.
    """
    return tuple(sorted({(node + 1) % nodes, 0} - {node}))


def judge(liveness: Liveness, bound: Bound, *, now: float, endpoint: str) -> Finding:
    """Decide which nodes are alive.

    Args:
        liveness: what this agent has observed.
        bound: longest tolerated silence.
        now: current time on the clock of `liveness`.
        endpoint: endpoint of the rendezvous, for the message.
    """
    if now - liveness.looked_at > bound.cut_s / 2:
        return AllAlive()
    silent_s = now - liveness.answered_at
    if silent_s > bound.cut_s:
        return CutOff(
            f"the rendezvous at {endpoint} has not answered for {silent_s:.1f} s, limit {bound.cut_s:g} s ({bound})"
        )
    lost = {node: now - at for node, at in liveness.heard_at.items() if now - at > bound.lost_s}
    if not lost:
        return AllAlive()
    names = ", ".join(str(node) for node in lost)
    return NodesLost(
        tuple(lost),
        f"node{'s' if len(lost) > 1 else ''} {names} of the round {'have' if len(lost) > 1 else 'has'} been silent "
        f"for {max(lost.values()):.1f} s, limit {bound.lost_s:g} s ({bound}, plus one interval)",
        max(lost.values()),
    )
