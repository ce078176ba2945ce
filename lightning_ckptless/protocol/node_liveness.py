"""Node liveness: how an agent interprets the heartbeats of other agents and the answers to its own.

An unplugged cable resets no connection, so a peer that waits for an answer waits forever. Therefore every agent
increments a counter in the rendezvous store and checks the counters of the nodes that it watches.

| Seen | Then |
|---|---|
| this agent was suspended and has not checked for half of the limit | nothing: it starts counting again |
| no answer from the rendezvous for the limit | this node is partitioned: its workers are stopped |
| no heartbeat from a watched node for the limit plus one interval | that node is lost: the other nodes re-rendezvous |
| its agent's connection was closed, and no heartbeat for twice its longest pause | that node is lost, likewise |
| | all nodes are alive |

A partitioned node notices it one interval before the others consider it lost, so its workers have stopped before the
others continue.

An agent's connection is closed by the kernel when its process ends. That alone proves nothing, as a firewall closes
connections too. So a closed connection only shortens the required silence, according to the node's own pauses between
heartbeats: to twice the longest of the last 120 (a minute), at least 1 s, at most the limit above. The longest pause is
used rather than the mean and deviation, as in a phi accrual detector, because pauses on a busy machine have a long tail
that quiet minutes do not show. A dead node cannot write, so the others need not wait for it to notice anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PAUSES = 120
"""Number of pauses between heartbeats that a node considers."""
_BEAT_S = 0.5
_FEWEST_PAUSES = 10
_FACTOR = 2.0
_LEAST_S = 1.0
_IN_FLIGHT_S = 1.0
"""A heartbeat seen later than this after the connection was closed was sent after it was closed."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The longest tolerated silence.

    Args:
        interval_s: unit of the limit, in seconds.
        attempts: the limit in intervals.
    """

    interval_s: float
    attempts: int

    @property
    def beat_s(self) -> float:
        """Seconds between two heartbeats."""
        return min(self.interval_s, _BEAT_S)

    @property
    def partitioned_s(self) -> float:
        """A node that receives no answer for more than these seconds is partitioned."""
        return self.interval_s * self.attempts

    @property
    def lost_s(self) -> float:
        """A node that sends no heartbeat for more than these seconds is lost."""
        return self.partitioned_s + self.interval_s

    def closed_s(self, longest_pause_s: float) -> float:
        """A node whose agent's connection was closed is lost after these seconds without a heartbeat.

        Args:
            longest_pause_s: longest of the last pauses between its heartbeats; 0 if not known yet.
        """
        return min(max(_LEAST_S, _FACTOR * longest_pause_s), self.lost_s) if longest_pause_s else self.lost_s

    def __str__(self) -> str:
        return f"keep_alive_interval={self.interval_s:g} x keep_alive_max_attempt={self.attempts}, plus one interval"


def longest_pause_s(pauses: Sequence[float]) -> float:
    """Return the longest of a node's pauses between heartbeats, in seconds; 0 if there are too few to tell."""
    return max(pauses) if len(pauses) >= _FEWEST_PAUSES else 0.0


@dataclass(frozen=True, slots=True)
class AllAlive:
    """All nodes are alive."""


@dataclass(frozen=True, slots=True)
class Partitioned:
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


Finding = AllAlive | Partitioned | NodesLost


@dataclass(frozen=True, slots=True)
class Heard:
    """What an agent has observed of a node that it watches; times are in seconds of one clock.

    Args:
        at: when its last heartbeat was seen.
        closed_at: when the connection to its agent was closed; None if it was not.
        longest_pause_s: longest of the last pauses between its heartbeats, as reported by itself; 0 if unknown.
    """

    at: float
    closed_at: float | None = None
    longest_pause_s: float = 0.0

    @property
    def seems_dead(self) -> bool:
        """Whether the connection to its agent was closed, and no heartbeat was sent after that."""
        return self.closed_at is not None and self.at - self.closed_at < _IN_FLIGHT_S

    def limit_s(self, bound: Bound) -> float:
        """The node is lost after these seconds without a heartbeat."""
        return bound.closed_s(self.longest_pause_s) if self.seems_dead else bound.lost_s


@dataclass(frozen=True, slots=True)
class Liveness:
    """What an agent has observed so far; times are in seconds of one clock.

    Args:
        looked_at: when this agent last checked.
        answered_at: when the rendezvous last answered.
        heard: what it has observed of each watched node.
    """

    looked_at: float
    answered_at: float
    heard: Mapping[int, Heard]


def watched_by(node: int, nodes: int) -> tuple[int, ...]:
    """The nodes that a node watches: the next two, and the first one, which hosts the workers' store.

    The nodes watch each other in a circle. So whichever nodes are lost, a live node precedes them in the circle,
    notices the loss and re-rendezvouses, and the others follow it. Two neighbours that are lost together are found
    together.

    Args:
        node: index of the node in the round.
        nodes: number of nodes.
    """
    return tuple(sorted({(node + 1) % nodes, (node + 2) % nodes, 0} - {node}))


def judge(liveness: Liveness, bound: Bound, *, now: float, endpoint: str) -> Finding:
    """Decide which nodes are alive.

    Args:
        liveness: what this agent has observed.
        bound: longest tolerated silence.
        now: current time on the clock of `liveness`.
        endpoint: endpoint of the rendezvous, for the message.
    """
    if now - liveness.looked_at > bound.partitioned_s / 2:
        return AllAlive()
    silent_s = now - liveness.answered_at
    if silent_s > bound.partitioned_s:
        return Partitioned(
            f"the rendezvous at {endpoint} has not answered for {silent_s:.1f} s, limit {bound.partitioned_s:g} s "
            f"(keep_alive_interval={bound.interval_s:g} x keep_alive_max_attempt={bound.attempts})"
        )
    # As of the last answer: without another one, an agent knows nothing newer.
    silent_of = {node: liveness.answered_at - heard.at for node, heard in liveness.heard.items()}
    limit_of = {node: heard.limit_s(bound) for node, heard in liveness.heard.items()}
    lost = [node for node, silent_s in silent_of.items() if silent_s > limit_of[node]]
    if not lost or any(limit_of[node] < bound.lost_s for node in liveness.heard if node not in lost):
        # If several seem dead, decide on all of them together, so that the other nodes re-rendezvous only once.
        return AllAlive()
    reasons = [_why_lost(node, silent_of[node], liveness.heard[node], bound) for node in lost]
    return NodesLost(tuple(lost), "; ".join(reasons), max(silent_of[node] for node in lost))


def _why_lost(node: int, silent_s: float, heard: Heard, bound: Bound) -> str:
    limit_s, why = heard.limit_s(bound), str(bound)
    if limit_s < bound.lost_s:
        why = f"its agent's connection was closed; its heartbeats were at most {heard.longest_pause_s:.2f} s apart"
    return f"node {node} of the round has been silent for {silent_s:.1f} s, limit {round(limit_s, 1):g} s ({why})"
