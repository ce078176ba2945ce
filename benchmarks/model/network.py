"""What messages between many ranks take, by the alpha-beta model: a latency per hop and a time per byte.

A collective is modelled by its algorithm. It takes the longer of two times: of its longest chain of messages, and of
the CPU time of all its messages on the cores of a node. Waiting for a slow rank, and messages that queue behind others
in the network, are not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, log2

FRAME_BYTES = 144
"""What gloo adds to the bytes of a message: its header, and the receiver's announcement that it is ready."""
GATHER_SEGMENTS = 2
"""Messages of a hop of gloo's allgather."""
VOTE_BYTES = 4
REQUESTS_PER_PEER = 2
"""Requests of a rank to the store for the address of one peer, when a gloo group is created."""
CROWDED = 4
"""Ranks per core above which the process that a message wakes is rarely in a cache."""


@dataclass(frozen=True)
class Cost:
    """What a call takes.

    Args:
        messages: that one rank sends, on average.
        sent_bytes: that one rank sends, on average.
        seconds: until all ranks are done.
    """

    messages: float = 0.0
    sent_bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.messages + other.messages, self.sent_bytes + other.sent_bytes, self.seconds + other.seconds)


@dataclass(frozen=True)
class Network:
    """A cluster of equal nodes.

    Args:
        hop_s: latency of a small message between two ranks, both processes included (alpha).
        crowded_hop_s: the same where a node has more than `CROWDED` ranks per core.
        byte_s: time per byte of a large message between two nodes (beta).
        message_cpu_s: CPU time of a message, at both ends together.
        turn_cpu_s: CPU time of one step of a gather on one rank, which ends with waiting for the next.
        shared_s: time of writing to shared memory until another process has seen it.
        group_s: fixed time of creating a group, most of it waiting for the store.
        connect_cpu_s: CPU time of a connection on one rank, with the reading of the peer's address.
        request_s: time of the store for one request; it answers one after another.
        ranks_per_node: number of ranks of a node.
        cores_per_node: number of cores of a node.
    """

    hop_s: float
    crowded_hop_s: float
    byte_s: float
    message_cpu_s: float
    turn_cpu_s: float
    shared_s: float
    group_s: float
    connect_cpu_s: float
    request_s: float
    ranks_per_node: int
    cores_per_node: int

    def one_machine(self, ranks: int) -> Network:
        """The same with all ranks on one node."""
        return replace(self, ranks_per_node=ranks)

    def nodes(self, ranks: int) -> int:
        return ceil(ranks / self.ranks_per_node)

    def slowdown(self, ranks: int) -> float:
        """How much longer work takes that all ranks do at once, if they have to share cores."""
        return max(1.0, min(ranks, self.ranks_per_node) / self.cores_per_node)

    def on_cores(self, ranks: int, cpu_s: float) -> float:
        """The time of a node until each of its ranks has used `cpu_s`."""
        return cpu_s * self.slowdown(ranks)

    def hops_s(self, ranks: int, count: int) -> float:
        """The time of messages that follow each other."""
        crowded = min(ranks, self.ranks_per_node) > CROWDED * self.cores_per_node
        return count * (self.crowded_hop_s if crowded else self.hop_s)

    # ------------------------------------------------------------------ collectives

    def ring_vote(self, ranks: int) -> Cost:
        """The allreduce of gloo for a few bytes: a ring, twice around, in which only one segment is not empty."""
        hops = 2 * (ranks - 1)
        sent = hops / ranks
        seconds = self.hops_s(ranks, hops) + hops * VOTE_BYTES * self.byte_s
        return Cost(sent, sent * (VOTE_BYTES + FRAME_BYTES), seconds)

    def node_vote(self, ranks: int) -> Cost:
        """The ranks of a node vote in shared memory, and one rank of each node votes with those of other nodes."""
        leaders = self.ring_vote(self.nodes(ranks)) if self.nodes(ranks) > 1 else Cost()
        return leaders + Cost(seconds=self._within_s(ranks))

    def doubling_vote(self, ranks: int) -> Cost:
        """Like `node_vote`, but the ranks that vote for their nodes double the number of known votes with each hop."""
        hops = ceil(log2(self.nodes(ranks)))
        leaders_s = self.hops_s(1, hops) + hops * VOTE_BYTES * self.byte_s
        return Cost(hops, hops * (VOTE_BYTES + FRAME_BYTES), leaders_s + self._within_s(ranks))

    def gather(self, ranks: int, page_bytes: int) -> Cost:
        """The allgather of gloo: a ring, in which every rank passes on the pages of all others."""
        hops, sent = ranks - 1, GATHER_SEGMENTS * (ranks - 1)
        length = page_bytes + GATHER_SEGMENTS * FRAME_BYTES
        # Ranks of a node follow each other in the ring: one of them sends over the node's link.
        path_s = self.hops_s(ranks, hops) + hops * length * self.byte_s
        return Cost(sent, hops * length, max(path_s, self.on_cores(ranks, hops * self.turn_cpu_s)))

    def exchange(self, ranks: int, messages: int, sent_bytes: int) -> Cost:
        """Messages between pairs of ranks, all at once."""
        length = sent_bytes + messages * FRAME_BYTES
        path_s = (
            self.hops_s(ranks, min(1, messages)) + length * self.ranks_per_node * self.byte_s
        )  # over the link of the node
        return Cost(messages, length, max(path_s, self.on_cores(ranks, messages * self.message_cpu_s)))

    # ------------------------------------------------------------------ a membership

    def mesh(self, ranks: int) -> Cost:
        """A new gloo group: every rank reads the addresses of all others from the store, and connects to them."""
        connections, requests = ranks - 1, REQUESTS_PER_PEER * ranks**2
        connected_s = self.on_cores(ranks, connections * self.connect_cpu_s)
        return Cost(connections, 0.0, self.group_s + max(connected_s, requests * self.request_s))

    def requests(self, total: int, of_a_rank: int, sent_bytes: int) -> Cost:
        """Requests of all ranks to the store of a membership, which is one process."""
        return Cost(of_a_rank, sent_bytes, total * self.request_s)

    def _within_s(self, ranks: int) -> float:
        """The time until the ranks of a node have combined their votes, and have learned the outcome."""
        return self.on_cores(ranks, 2 * self.shared_s)
