"""A transport whose votes stay within the node as far as possible.

| | on one node | between nodes |
|---|---|---|
| `vote`, `agree` | in memory that the ranks of the node share | messages between the lowest ranks of the nodes |
| `exchange`, `gather` | messages | messages |

A vote takes place for every version, while the others belong to meetings, or carry the state. It costs no message and
no thread on one node, and cannot be lost in gloo (`membership/worker/stuck_collectives.py`). Between nodes it grows
with their number, and not with that of the ranks.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from lightning_ckptless.errors import TransportError
from lightning_ckptless.protocol.ballots import dissemination
from lightning_ckptless.replica.arena_owner import OWNER, Owner
from lightning_ckptless.replica.ballot_box import BALLOTS_NAME, BallotBox, Mate, make_ballots, map_ballots
from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.transport import Message, Transport, gather_json, receive_buffer, tensor_of

_BITS = struct.Struct("!Q")
_TAG = 1 << 30
"""No shard has a tag as large as this."""


class NodeTransport:
    """See the module.

    Args:
        messages: carries messages between all ranks; closed with this transport.
        box: the ballots of this node; closed with this transport.
        leaders: the lowest rank of each node, in ascending order.
    """

    def __init__(self, messages: Transport, box: BallotBox, leaders: Sequence[int]) -> None:
        self.rank = messages.rank
        self.world_size = messages.world_size
        self._messages = messages
        self._box = box
        self._leaders = leaders

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """See `Transport.exchange`."""
        self._messages.exchange(sends, receives)

    def gather(self, payload: bytes) -> list[bytes]:
        """See `Transport.gather`."""
        return self._messages.gather(payload)

    def vote(self, mine: int) -> int:
        """See `Transport.vote`."""
        outcome = self._box.collect(mine)
        if len(self._leaders) > 1 and self.rank in self._leaders:
            try:
                outcome = self._combine(outcome)
            except BaseException:
                # Without an announcement, this rank is no longer in the same round as its node.
                self._box.abort()
                raise
            self._box.announce(outcome)
        return outcome

    def agree(self, mine: bool) -> bool:
        """See `Transport.agree`."""
        return self.vote(int(mine)) == 1

    def close(self) -> None:
        """Close the transport. A thread that still votes gets an error."""
        self._box.close()
        self._messages.close()

    def _combine(self, bits: int) -> int:
        """Combine the outcome of this node with those of the others."""
        for target, source in dissemination(self._leaders.index(self.rank), len(self._leaders)):
            received = receive_buffer(_BITS.size)
            sent = tensor_of(_BITS.pack(bits))
            self._messages.exchange([(self._leaders[target], _TAG, sent)], [(self._leaders[source], _TAG, received)])
            bits &= _BITS.unpack(bytes_of(received))[0]
        return bits


def share_votes(
    messages: Transport,
    nodes: Sequence[str],
    folder: Path,
    *,
    timeout_s: float,
    when_open: Callable[[BallotBox], None],
) -> NodeTransport:
    """Let the ranks of each node vote in shared memory. All ranks call it together.

    Args:
        messages: connects all ranks.
        nodes: node name of each rank.
        folder: folder of the arena of this node.
        timeout_s: longest wait for a vote, in seconds.
        when_open: called with the ballots of this node before the ranks wait for each other there.

    Raises:
        ArenaError: the shared memory cannot be created.
        TransportError: a peer is lost.
    """
    rank = messages.rank
    ranks = [other for other, node in enumerate(nodes) if node == nodes[rank]]
    leads = rank == ranks[0]
    path = make_ballots(folder, len(ranks)) if leads else None
    try:
        facts = gather_json(messages, [asdict(Owner.of(os.getpid())), path.name if path is not None else ""])
        mates = [Mate(other, OWNER(facts[other][0], "process")) for other in ranks]
        try:
            memory = map_ballots(folder / BALLOTS_NAME(facts[ranks[0]][1], "votes"))
        except OSError as error:
            raise TransportError(f"rank {rank}: rank {ranks[0]} of this node has left the meeting: {error}") from error
        leaders = sorted({nodes.index(node) for node in nodes})
        box = BallotBox(memory, mates, rank, is_led=len(leaders) > 1, timeout_s=timeout_s)
        when_open(box)
        shared = NodeTransport(messages, box, leaders)
        shared.agree(True)
        return shared
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
