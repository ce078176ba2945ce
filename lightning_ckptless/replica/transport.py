"""How bytes move between ranks: one narrow interface, three implementations.

Every method is collective or pairwise as it says, blocks until its part is done, and raises `TransportError` when a
peer does not answer. A transport is used by one thread at a time.
"""

from __future__ import annotations

import struct
import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import and_
from typing import Protocol

import torch
import torch.distributed as dist

from lightning_ckptless.errors import TransportError
from lightning_ckptless.replica.checksum import bytes_of

_LENGTH = struct.Struct("!Q")
_PAGE_BYTES = 8192
_FIRST_PAGE_BYTES = _PAGE_BYTES - _LENGTH.size

Parcel = tuple[int, int, torch.Tensor]
"""Peer, tag, flat uint8 tensor in host memory. Both sides know the length; the tag tells parcels of a pair apart."""


def room(length_bytes: int) -> torch.Tensor:
    """Room for a parcel to receive."""
    return torch.empty(length_bytes, dtype=torch.uint8)


def tensor_of(data: bytes) -> torch.Tensor:
    """Bytes as a parcel to send."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else room(0)


class Transport(Protocol):
    """Between the ranks of a run.

    Ownership: a tensor that is sent must not change, and one that is received must not be read, until `exchange`
    returns. Afterwards both are the caller's again. When it raises, what was under way may still be read and written
    until the peers are gone: none of the buffers holds anything that counts.

    Attributes:
        rank: this rank.
        world_size: number of ranks.
    """

    rank: int
    world_size: int

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        """Send and receive parcels, all at once; every send has a receive of the same tag and length at its peer.

        Raises:
            TransportError: a peer is gone, or silent for too long.
        """

    def vote(self, mine: int) -> int:
        """The bits that every rank has set. All ranks must call it: no rank returns before the last has entered.

        Raises:
            TransportError: a peer is gone, or silent for too long.
        """

    def agree(self, mine: bool) -> bool:
        """Whether every rank said True; otherwise as `vote`.

        Raises:
            TransportError: a peer is gone, or silent for too long.
        """

    def gather(self, payload: bytes) -> list[bytes]:
        """The payloads of all ranks, by rank. All ranks must call it; lengths may differ.

        Raises:
            TransportError: a peer is gone, or silent for too long.
        """

    def close(self) -> None:
        """Stop taking part."""


class SoloTransport:
    """A world of one rank."""

    rank = 0
    world_size = 1

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        """Nothing to do: there are no peers."""
        assert not sends and not receives, "a world of one has no peers"

    def vote(self, mine: int) -> int:
        """This rank's own bits."""
        return mine

    def agree(self, mine: bool) -> bool:
        """This rank's own word."""
        return mine

    def gather(self, payload: bytes) -> list[bytes]:
        """This rank's own payload."""
        return [payload]

    def close(self) -> None:
        """Nothing to release."""


class _Hub:
    """Where the ranks of a loopback world leave parcels for each other."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.changed = threading.Condition()
        self.parcels: dict[tuple[int, int, object], deque[bytes]] = defaultdict(deque)
        self.gone: set[int] = set()

    def put(self, source: int, target: int, tag: object, data: bytes) -> None:
        with self.changed:
            if source in self.gone:
                raise TransportError(f"rank {source}: its transport is closed")
            if target in self.gone:
                raise TransportError(f"rank {source}: rank {target} is gone, it cannot be sent {len(data)} bytes")
            self.parcels[source, target, tag].append(data)
            self.changed.notify_all()

    def take(self, source: int, target: int, tag: object) -> bytes:
        queue = self.parcels[source, target, tag]
        with self.changed:
            self.changed.wait_for(lambda: queue or {source, target} & self.gone, self.timeout_s)
            if queue:
                return queue.popleft()
            if target in self.gone:
                raise TransportError(f"rank {target}: its transport is closed")
            why = "is gone" if source in self.gone else f"did not answer within {self.timeout_s} s"
            raise TransportError(f"rank {target}: rank {source} {why}")

    def leave(self, rank: int) -> None:
        with self.changed:
            self.gone.add(rank)
            self.changed.notify_all()


class LoopbackTransport:
    """Ranks that are threads of one process. Parcels are copied when they are sent."""

    def __init__(self, hub: _Hub, rank: int) -> None:
        self._hub = hub
        self.rank = rank
        self.world_size = hub.world_size

    @classmethod
    def world(cls, world_size: int, *, timeout_s: float = 10.0) -> list[LoopbackTransport]:
        """One transport per rank.

        Args:
            world_size: number of ranks.
            timeout_s: silence of a peer after which it is given up.
        """
        hub = _Hub(world_size, timeout_s)
        return [cls(hub, rank) for rank in range(world_size)]

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
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
        return reduce(and_, (said[0] for said in self.gather(bytes([mine]))))

    def agree(self, mine: bool) -> bool:
        """See `Transport.agree`."""
        return self.vote(int(mine)) == 1

    def gather(self, payload: bytes) -> list[bytes]:
        """See `Transport.gather`."""
        for peer in range(self.world_size):
            self._hub.put(self.rank, peer, "gather", payload)
        return [self._hub.take(peer, self.rank, "gather") for peer in range(self.world_size)]

    def close(self) -> None:
        """Leave the world: peers that wait for this rank are told."""
        self._hub.leave(self.rank)


class GlooTransport:
    """A gloo group of torch.distributed, over host memory.

    Args:
        group: a group that nothing else uses, so that no other collective orders against ours; its timeout is the
            silence after which a peer is given up. None for the default group. Whoever made it destroys it.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        chosen = group if group is not None else dist.group.WORLD
        assert chosen is not None, "torch.distributed is not initialized"
        self._group = chosen
        self.rank = self._group.rank()
        self.world_size = self._group.size()

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        """See `Transport.exchange`."""
        with self._blaming("exchange"):
            works = [self._group.recv([empty], peer, tag) for peer, tag, empty in receives if empty.numel()]
            works += [self._group.send([data], peer, tag) for peer, tag, data in sends if data.numel()]
            for work in works:
                work.wait()

    def vote(self, mine: int) -> int:
        """See `Transport.vote`."""
        ballot = torch.tensor([mine], dtype=torch.int32)
        how = dist.AllreduceOptions()
        how.reduceOp = dist.ReduceOp(dist.ReduceOp.BAND)
        with self._blaming("vote"):
            self._group.allreduce([ballot], how).wait()
        return int(ballot.item())

    def agree(self, mine: bool) -> bool:
        """See `Transport.agree`."""
        return self.vote(int(mine)) == 1

    def gather(self, payload: bytes) -> list[bytes]:
        """See `Transport.gather`."""
        with self._blaming("gather"):
            # Most payloads fit into one page, and a recovery waits for every collective.
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
        """Nothing of its own to release: whoever made the group destroys it."""

    @contextmanager
    def _blaming(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise TransportError(f"rank {self.rank} of {self.world_size}: {what} with peers failed: {error}") from error
