"""Data transfer between ranks: one narrow interface, and three implementations. `node_transport.py` is the fourth.

Every method blocks until its part is done, and raises `TransportError` if a peer does not answer. A transport is used
by one thread at a time.
"""

from __future__ import annotations

import json
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import and_
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lightning_ckptless.errors import TransportError
from lightning_ckptless.formats.schema import Json
from lightning_ckptless.replica.checksum import bytes_of

_LENGTH = struct.Struct("!Q")
_PAGE_BYTES = 8192
_FIRST_PAGE_BYTES = _PAGE_BYTES - _LENGTH.size

Message = tuple[int, int, torch.Tensor]
"""Peer, tag, flat uint8 tensor in host memory. Both peers know the length; the tag distinguishes their messages."""


def receive_buffer(length_bytes: int) -> torch.Tensor:
    """An uninitialized buffer for a message to receive."""
    return torch.empty(length_bytes, dtype=torch.uint8)


def tensor_of(data: bytes) -> torch.Tensor:
    """A copy of bytes as a message to send."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else receive_buffer(0)


class Transport(Protocol):
    """A transport between the ranks of a run.

    Until `exchange` returns, a tensor that is sent must not change, and one that is received must not be read.
    Afterwards both belong to the caller again. If it raises, buffers in flight may still be read and written until the
    peers have exited, so their contents are undefined.

    Attributes:
        rank: this rank.
        world_size: number of ranks.
    """

    rank: int
    world_size: int

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Send and receive messages concurrently. Each send needs a receive of the same tag and length at its peer.

        Raises:
            TransportError: a peer is lost or does not answer in time.
        """

    def vote(self, mine: int) -> int:
        """The bitwise AND over all ranks. Collective: no rank returns before the last one has called it.

        Args:
            mine: not negative, of at most `BALLOT_BITS` bits.

        Raises:
            TransportError: a peer is lost or does not answer in time.
        """

    def agree(self, mine: bool) -> bool:
        """Whether every rank passed True. Collective, like `vote`.

        Raises:
            TransportError: a peer is lost or does not answer in time.
        """

    def gather(self, payload: bytes) -> list[bytes]:
        """The payloads of all ranks, by rank. Collective; lengths may differ.

        Raises:
            TransportError: a peer is lost or does not answer in time.
        """

    def close(self) -> None:
        """Release the transport."""


def gather_json(transport: Transport, value: Json) -> list[Any]:
    """The JSON values of all ranks, by rank. Collective.

    Raises:
        TransportError: a peer is lost or does not answer in time.
    """
    return [json.loads(payload) for payload in transport.gather(json.dumps(value).encode())]


class SoloTransport:
    """A world of one rank."""

    rank = 0
    world_size = 1

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Nothing to do: there are no peers."""
        assert not sends and not receives, "a world of one rank has no peers"

    def vote(self, mine: int) -> int:
        """This rank's own bits."""
        return mine

    def agree(self, mine: bool) -> bool:
        """This rank's own value."""
        return mine

    def gather(self, payload: bytes) -> list[bytes]:
        """This rank's own payload."""
        return [payload]

    def close(self) -> None:
        """Nothing to release."""


class _Hub:
    """The message queues of a loopback world."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.changed = threading.Condition()
        self.messages: dict[tuple[int, int, object], deque[bytes]] = defaultdict(deque)
        self.closed: set[int] = set()

    def put(self, source: int, target: int, tag: object, data: bytes) -> None:
        with self.changed:
            if source in self.closed:
                raise TransportError(f"rank {source}: its transport is closed")
            if target in self.closed:
                raise TransportError(f"rank {source}: cannot send {len(data)} bytes: rank {target} has closed")
            self.messages[source, target, tag].append(data)
            self.changed.notify_all()

    def take(self, source: int, target: int, tag: object) -> bytes:
        with self.changed:
            # Inside, because a missing queue is created here.
            queue = self.messages[source, target, tag]
            self.changed.wait_for(lambda: queue or {source, target} & self.closed, self.timeout_s)
            if queue:
                return queue.popleft()
            if target in self.closed:
                raise TransportError(f"rank {target}: its transport is closed")
            why = "has closed" if source in self.closed else f"did not answer within {self.timeout_s} s"
            raise TransportError(f"rank {target}: rank {source} {why}")

    def leave(self, rank: int) -> None:
        with self.changed:
            self.closed.add(rank)
            self.changed.notify_all()


class LoopbackTransport:
    """A transport between threads of one process. Messages are copied when they are sent."""

    def __init__(self, hub: _Hub, rank: int) -> None:
        self._hub = hub
        self.rank = rank
        self.world_size = hub.world_size

    @classmethod
    def world(cls, world_size: int, *, timeout_s: float = 10.0) -> list[LoopbackTransport]:
        """One transport per rank.

        Args:
            world_size: number of ranks.
            timeout_s: longest wait for a peer, in seconds.
        """
        hub = _Hub(world_size, timeout_s)
        return [cls(hub, rank) for rank in range(world_size)]

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """See `Transport.exchange`."""
        for peer, tag, tensor in sends:
            self._hub.put(self.rank, peer, tag, bytes(bytes_of(tensor)))
        for peer, tag, tensor in receives:
            data = self._hub.take(peer, self.rank, tag)
            if len(data) != tensor.numel():
                raise TransportError(
                    f"rank {self.rank}: rank {peer} sent {len(data)} bytes under tag {tag}, expected {tensor.numel()}"
                )
            bytes_of(tensor)[:] = data

    def vote(self, mine: int) -> int:
        """See `Transport.vote`."""
        return reduce(and_, map(int, self.gather(str(mine).encode())))

    def agree(self, mine: bool) -> bool:
        """See `Transport.agree`."""
        return self.vote(int(mine)) == 1

    def gather(self, payload: bytes) -> list[bytes]:
        """See `Transport.gather`."""
        for peer in range(self.world_size):
            self._hub.put(self.rank, peer, "gather", payload)
        return [self._hub.take(peer, self.rank, "gather") for peer in range(self.world_size)]

    def close(self) -> None:
        """Close the transport. Peers that wait for this rank get an error."""
        self._hub.leave(self.rank)


class GlooTransport:
    """A transport over a gloo group of torch.distributed, in host memory.

    Args:
        group: a group that nothing else uses, so that its collectives are not ordered against others. Its timeout is
            the longest wait for a peer. The creator of the group destroys it. None for the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        chosen = group if group is not None else dist.group.WORLD
        assert chosen is not None, "torch.distributed is not initialized"
        self._group = chosen
        self.rank = self._group.rank()
        self.world_size = self._group.size()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """See `Transport.exchange`."""
        with self._describing_errors("exchange"):
            works = [self._group.recv([empty], peer, tag) for peer, tag, empty in receives if empty.numel()]
            works += [self._group.send([data], peer, tag) for peer, tag, data in sends if data.numel()]
            for work in works:
                work.wait()

    def vote(self, mine: int) -> int:
        """See `Transport.vote`."""
        ballot = torch.tensor([mine], dtype=torch.int64)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.BAND)
        with self._describing_errors("vote"):
            self._group.allreduce([ballot], options).wait()
        return int(ballot.item())

    def agree(self, mine: bool) -> bool:
        """See `Transport.agree`."""
        return self.vote(int(mine)) == 1

    def gather(self, payload: bytes) -> list[bytes]:
        """See `Transport.gather`."""
        with self._describing_errors("gather"):
            # Most payloads fit into one page, which saves a collective on the critical path of a recovery.
            page = _LENGTH.pack(len(payload)) + payload[:_FIRST_PAGE_BYTES]
            pages = [bytes_of(page) for page in self._all_gather(tensor_of(page.ljust(_PAGE_BYTES, b"\0")))]
            lengths = [_LENGTH.unpack(page[: _LENGTH.size])[0] for page in pages]
            heads = [bytes(page[_LENGTH.size :][:length]) for page, length in zip(pages, lengths, strict=True)]
            longest = max(lengths) - _FIRST_PAGE_BYTES
            if longest <= 0:
                return heads
            rests = self._all_gather(tensor_of(payload[_FIRST_PAGE_BYTES:].ljust(longest, b"\0")))
        return [
            head + bytes(bytes_of(rest)[: max(0, length - _FIRST_PAGE_BYTES)])
            for head, rest, length in zip(heads, rests, lengths, strict=True)
        ]

    def _all_gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        self._group.allgather([everyone], [mine]).wait()
        return everyone

    def close(self) -> None:
        """Nothing to release: the creator of the group destroys it."""

    @contextmanager
    def _describing_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise TransportError(f"rank {self.rank} of {self.world_size}: {what} with peers failed: {error}") from error
