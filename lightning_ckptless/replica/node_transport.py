"""A transport that stays within the node as far as possible.

| | on one node | between nodes |
|---|---|---|
| `vote`, `agree`, `gather` | in memory that its ranks share | messages between the lowest ranks of the nodes |
| `exchange` | messages | messages |

A vote takes place for every version, and a recovery makes a dozen gathers. In memory they cost no message and no
thread, and cannot be lost in gloo (`membership/worker/stuck_collectives.py`). Between nodes they grow with the number
of nodes, and not with that of the ranks.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path

from lightning_ckptless.errors import TransportError
from lightning_ckptless.protocol.ballots import dissemination
from lightning_ckptless.replica.ballot_box import BallotBox
from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.node_memory import MEMORY_NAME, NodeMemory, make_memory
from lightning_ckptless.replica.transport import Message, Transport, receive_buffer, tensor_of

_BITS = struct.Struct("!Q")
_TAG = 1 << 30
"""No shard has a tag as large as this."""


class NodeTransport:
    """See the module.

    Args:
        box: the ballots and payloads of this node; closed with this transport.
        nodes: node name of each rank.
        messages: carries messages between all ranks, but nothing else; closed with this transport.
    """

    def __init__(self, box: BallotBox, nodes: Sequence[str], messages: Transport) -> None:
        self.rank = messages.rank
        self.world_size = messages.world_size
        self._messages = messages
        self._box = box
        self._members = ranks_of_nodes(nodes)
        self._leaders = [ranks[0] for ranks in self._members]

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """See `Transport.exchange`."""
        self._messages.exchange(sends, receives)

    def gather(self, payload: bytes) -> list[bytes]:
        """See `Transport.gather`."""
        of_node = self._box.gather(payload)
        if len(self._leaders) == 1:
            return of_node
        if self.rank not in self._leaders:
            return _unpack(of_node[0])
        with self._as_leader():
            payloads = self._gather_nodes(of_node)
            self._box.announce(0, _pack(payloads))
        return payloads

    def vote(self, mine: int) -> int:
        """See `Transport.vote`."""
        outcome = self._box.collect(mine)
        if len(self._leaders) > 1 and self.rank in self._leaders:
            with self._as_leader():
                outcome = self._combine(outcome)
                self._box.announce(outcome)
        return outcome

    def agree(self, mine: bool) -> bool:
        """See `Transport.agree`."""
        return self.vote(int(mine)) == 1

    def close(self) -> None:
        """Close the transport. A thread that still votes gets an error."""
        self._box.close()
        self._messages.close()

    @contextmanager
    def _as_leader(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Without an announcement, this rank is no longer in the same round as its node.
            self._box.abort()
            raise

    def _combine(self, bits: int) -> int:
        """Combine the outcome of this node with those of the others."""
        for target, source in dissemination(self._leaders.index(self.rank), len(self._leaders)):
            bits &= _BITS.unpack(self._trade(target, source, _BITS.pack(bits), _BITS.size))[0]
        return bits

    def _gather_nodes(self, of_node: Sequence[bytes]) -> list[bytes]:
        """Gather the payloads of all ranks, given those of this node."""
        place, places = self._leaders.index(self.rank), len(self._leaders)
        known = {place: _pack(of_node)}
        for target, source in dissemination(place, places):
            # The last step brings some nodes a second time.
            sent = _pack([known[(place - back) % places] for back in range(len(known))])
            length = _BITS.unpack(self._trade(target, source, _BITS.pack(len(sent)), _BITS.size))[0]
            received = _unpack(self._trade(target, source, sent, length))
            known |= {(source - back) % places: payloads for back, payloads in enumerate(received)}
        found = {
            rank: payload
            for node, ranks in enumerate(self._members)
            for rank, payload in zip(ranks, _unpack(known[node]), strict=True)
        }
        return [found[rank] for rank in range(self.world_size)]

    def _trade(self, target: int, source: int, sent: bytes, length: int) -> bytes:
        """Send a message to one leader while another one's is received, whose length is known."""
        received = receive_buffer(length)
        sends = [(self._leaders[target], _TAG, tensor_of(sent))]
        self._messages.exchange(sends, [(self._leaders[source], _TAG, received)])
        return bytes(bytes_of(received))


def ranks_of_nodes(nodes: Sequence[str]) -> list[list[int]]:
    """The ranks of each node, in the order of their lowest ranks."""
    found: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        found.setdefault(node, []).append(rank)
    return [*found.values()]


def share_memory(
    messages: Transport,
    nodes: Sequence[str],
    folder: Path,
    *,
    spread_name: Callable[[str], str],
    timeout_s: float,
    when_open: Callable[[BallotBox], None],
) -> NodeTransport:
    """Connect the ranks of each node by memory that they share. All ranks call it together.

    Args:
        messages: carries messages between all ranks.
        nodes: node name of each rank.
        folder: folder of the arena of this node.
        spread_name: gives a name to the other ranks of this node; returns the name that the lowest rank has given.
        timeout_s: longest wait for a vote, in seconds.
        when_open: called with the ballots of this node before the ranks wait for each other there.

    Raises:
        ArenaError: the shared memory cannot be created.
        TransportError: a peer is lost.
    """
    rank = messages.rank
    ranks = [other for other, node in enumerate(nodes) if node == nodes[rank]]
    path = make_memory(folder, len(ranks)) if rank == ranks[0] else None
    try:
        name = spread_name(path.name if path is not None else "")
        try:
            memory = NodeMemory(folder / MEMORY_NAME(name, "name"), len(ranks))
        except OSError as error:
            raise TransportError(
                f"rank {rank}: rank {ranks[0]} of this node has left the rendezvous: {error}"
            ) from error
        box = BallotBox(memory, ranks, rank, is_led=len(ranks) < len(nodes), timeout_s=timeout_s)
        when_open(box)
        shared = NodeTransport(box, nodes, messages)
        shared.agree(True)
        return shared
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def _pack(parts: Sequence[bytes]) -> bytes:
    return b"".join([_BITS.pack(len(parts)), *(_BITS.pack(len(part)) for part in parts), *parts])


def _unpack(data: bytes) -> list[bytes]:
    count = _BITS.unpack_from(data)[0]
    lengths = [_BITS.unpack_from(data, _BITS.size * (1 + index))[0] for index in range(count)]
    ends = list(accumulate(lengths, initial=_BITS.size * (1 + count)))
    return [data[begin:end] for begin, end in pairwise(ends)]
