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
        byte_s: time per byte of a large message between two nodes (beta).
        message_cpu_s: CPU time of a message, at both ends together.
        call_s: time of a call on one rank, whatever it sends: Python, and waking a thread.
        shared_s: time of writing to shared memory until another process has seen it.
        connect_cpu_s: CPU time of a connection, at both ends together, with the addresses read from the store.
        request_s: time of the store for one request; it answers one after another.
        ranks_per_node: number of ranks of a node.
        cores_per_node: number of cores of a node.
    """

    hop_s: float
    byte_s: float
    message_cpu_s: float
    call_s: float
    shared_s: float
    connect_cpu_s: float
    request_s: float
    ranks_per_node: int
    cores_per_node: int

    def nodes(self, ranks: int) -> int:
        return ceil(ranks / self.ranks_per_node)

    def slowdown(self, ranks: int) -> float:
        """How much longer work takes that all ranks do at once, if they have to share cores."""
        return max(1.0, min(ranks, self.ranks_per_node) / self.cores_per_node)

    def on_cores(self, ranks: int, cpu_s: float) -> float:
        """The time of a node until each of its ranks has used `cpu_s`."""
        return cpu_s * self.slowdown(ranks)

    # ------------------------------------------------------------------ collectives

    def ring_vote(self, ranks: int) -> Cost:
        """The allreduce of gloo for a few bytes: a ring, twice around, in which only one segment is not empty."""
        hops = 2 * (ranks - 1)
        sent = hops / ranks
        path_s = self.call_s + hops * (self.hop_s + VOTE_BYTES * self.byte_s)
        return self._cost(ranks, sent, sent * (VOTE_BYTES + FRAME_BYTES), path_s)

    def node_vote(self, ranks: int) -> Cost:
        """The ranks of a node vote in shared memory, and one rank of each node votes with those of other nodes."""
        leaders = self.ring_vote(self.nodes(ranks)) if self.nodes(ranks) > 1 else Cost()
        within_s = self.call_s + self.on_cores(ranks, 2 * self.shared_s)
        return leaders + Cost(seconds=within_s)

    def doubling_vote(self, ranks: int) -> Cost:
        """Like `node_vote`, but the ranks that vote for their nodes double the number of known votes with each hop."""
        hops = ceil(log2(self.nodes(ranks)))
        leaders_s = self.call_s + hops * (self.hop_s + VOTE_BYTES * self.byte_s) if hops else 0.0
        within_s = self.call_s + self.on_cores(ranks, 2 * self.shared_s)
        return Cost(hops, hops * (VOTE_BYTES + FRAME_BYTES), leaders_s + within_s)

    def gather(self, ranks: int, page_bytes: int) -> Cost:
        """The allgather of gloo: a ring, in which every rank passes on the pages of all others."""
        hops, sent = ranks - 1, GATHER_SEGMENTS * (ranks - 1)
        length = page_bytes + GATHER_SEGMENTS * FRAME_BYTES
        path_s = self.call_s + hops * (self.hop_s + self._shared_link(length) * self.byte_s)
        return self._cost(ranks, sent, hops * length, path_s)

    def exchange(self, ranks: int, messages: int, sent_bytes: int) -> Cost:
        """Messages between pairs of ranks, all at once."""
        length = sent_bytes + messages * FRAME_BYTES
        path_s = self.call_s + (self.hop_s if messages else 0.0) + self._shared_link(length) * self.byte_s
        return self._cost(ranks, messages, length, path_s)

    # ------------------------------------------------------------------ a membership

    def one_machine(self, ranks: int) -> Network:
        """The same with all ranks on one node."""
        return replace(self, ranks_per_node=ranks)

    def mesh(self, ranks: int) -> Cost:
        """A new gloo group: every rank connects to every other."""
        connections = ranks - 1
        return Cost(connections, 0.0, self.call_s + self.on_cores(ranks, connections * self.connect_cpu_s))

    def requests(self, total: int, of_a_rank: int, sent_bytes: int) -> Cost:
        """Requests of all ranks to the store of a membership, which is one process."""
        return Cost(of_a_rank, sent_bytes, total * self.request_s)

    # ------------------------------------------------------------------ shared resources

    def _shared_link(self, length_bytes: int) -> int:
        """The bytes that pass a node's link while each of its ranks sends so many."""
        return length_bytes * self.ranks_per_node

    def _cost(self, ranks: int, messages: float, sent_bytes: float, path_s: float) -> Cost:
        cpu_s = self.call_s + self.on_cores(ranks, messages * self.message_cpu_s)
        return Cost(messages, sent_bytes, max(path_s, cpu_s))
