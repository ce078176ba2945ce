"""Transfer shards from the slots of their writers into the slots of their holders.

The static part of a shard is not sent if it is what the holder received in the round before. The writer sends the
digest of what it omits with the header. A holder whose slot does not contain it yet copies it from the slot that it
wrote last: which slots two ranks write differs once one of them has lost its history.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lightning_ckptless.errors import TransportError
from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.slot import HEADER_BYTES, Slot, SlotHeader
from lightning_ckptless.replica.slot_ring import SlotRing
from lightning_ckptless.replica.slot_stamp import Stamp
from lightning_ckptless.replica.transport import Message, Transport, receive_buffer, tensor_of

PAGE, BULK, BLOB = range(3)
"""Tags of the messages of a round. A rank sends only its own shard, so tags are unique between two ranks."""

_PREFIX = struct.Struct("!Q64s")
_PAGE_BYTES = HEADER_BYTES + _PREFIX.size


@dataclass(frozen=True)
class KnownPrefix:
    """The first bytes of a slot whose digest is already known.

    Args:
        length_bytes: number of bytes; 0 if none are known.
        digest: digest of these bytes.
    """

    length_bytes: int = 0
    digest: str = ""

    def encode(self) -> bytes:
        """Serialize, to be sent after the header."""
        return _PREFIX.pack(self.length_bytes, self.digest.encode())

    @classmethod
    def decode(cls, data: bytes) -> KnownPrefix:
        """Parse the result of `encode`."""
        length_bytes, digest = _PREFIX.unpack(data)
        return cls(length_bytes, digest.rstrip(b"\0").decode())


@dataclass(frozen=True)
class OutgoingShard:
    """This rank's own shard, ready to be sent.

    Args:
        slot: sealed slot of the shard.
        blob: the host state.
        static: the static part.
        repeats_static: whether the static part is sent even if the holders already have it.
    """

    slot: Slot
    blob: bytes
    static: KnownPrefix
    repeats_static: bool = False


class ShardExchange:
    """Sends this rank's shard to its holders and receives the shards of its sources.

    Args:
        transport: transport between the ranks.
        holders: ranks that keep this rank's shard.
        rings: slot rings of this rank, by shard.
    """

    def __init__(self, transport: Transport, holders: Sequence[int], rings: Mapping[int, SlotRing]) -> None:
        self._transport = transport
        self._holders = holders
        self._rings = {shard: ring for shard, ring in rings.items() if shard != transport.rank}
        self._sent = KnownPrefix()
        self._last: dict[int, Slot] = {}
        self._known: dict[Path, KnownPrefix] = {}
        self.sent_bytes = 0

    def exchange(self, own: OutgoingShard | None, stamp_of: Callable[[int], Stamp]) -> dict[int, Slot]:
        """Send and receive the shards of one round.

        Args:
            own: this rank's shard; None if it has none in this round.
            stamp_of: expected stamp of a source's shard.

        Returns:
            The slots that now contain the version, by shard.

        Raises:
            TransportError: a peer is lost or sends unexpected data.
        """
        sends: list[Message] = []
        omits = own is not None and own.static == self._sent and not own.repeats_static
        if own is not None:
            parts = ((BULK, own.slot.bulk[own.static.length_bytes if omits else 0 :]), (BLOB, tensor_of(own.blob)))
            self._sent = own.static
            sends = [(holder, *part) for holder in self._holders for part in parts]
            self.sent_bytes += sum(data.numel() for _, _, data in sends)
        receives: list[Message] = []
        arriving: dict[int, tuple[Slot, SlotHeader, KnownPrefix, torch.Tensor]] = {}
        for source, (header, static, is_static_sent) in self._pages(own, omits=omits).items():
            slot = self._begin(source, header, stamp_of(source), static if is_static_sent else None)
            blob = receive_buffer(header.blob_bytes)
            bulk = slot.bulk[static.length_bytes if is_static_sent else 0 :]
            receives += [(source, BULK, bulk), (source, BLOB, blob)]
            arriving[source] = slot, header, static, blob
        self._transport.exchange(sends, receives)
        for slot, header, static, blob in arriving.values():
            slot.seal(replace(header.stamp, holder=self._transport.rank), bytes_of(blob), header.checksum)
            self._known[slot.path] = static
            self._last[header.stamp.shard] = slot
        kept = {source: slot for source, (slot, *_) in arriving.items()}
        return kept if own is None else {self._transport.rank: own.slot} | kept

    def _pages(self, own: OutgoingShard | None, *, omits: bool) -> dict[int, tuple[SlotHeader, KnownPrefix, bool]]:
        """Send the header page to holders and receive those of sources; an empty page announces no shard."""
        page = bytes(_PAGE_BYTES + 1)
        if own is not None:
            assert own.slot.header is not None
            page = own.slot.header.encode() + own.static.encode() + bytes([omits])
        sent, pages = tensor_of(page), {source: receive_buffer(len(page)) for source in self._rings}
        self._transport.exchange(
            [(holder, PAGE, sent) for holder in self._holders], [(source, PAGE, page) for source, page in pages.items()]
        )
        received = {}
        for source, buffer in pages.items():
            data = bytes(bytes_of(buffer))
            header = SlotHeader.decode(data[:HEADER_BYTES])
            if header is not None:
                received[source] = header, KnownPrefix.decode(data[HEADER_BYTES:_PAGE_BYTES]), bool(data[_PAGE_BYTES])
        return received

    def _begin(self, source: int, header: SlotHeader, expected: Stamp, omitted: KnownPrefix | None) -> Slot:
        """Begin to overwrite the slot for a source's shard.

        Args:
            source: rank of the shard.
            header: received header.
            expected: expected stamp.
            omitted: prefix that the source does not send; None if it sends everything.
        """
        slot, sent = self._rings[source].free(), replace(expected, holder=source)
        if header.stamp != sent or header.bulk_bytes != slot.bulk_bytes:
            raise TransportError(
                f"rank {self._transport.rank}: rank {source} sends {header.stamp} of {header.bulk_bytes} bytes, "
                f"expected {sent} of {slot.bulk_bytes} bytes"
            )
        last = self._last.get(source)
        known = KnownPrefix() if last is None else self._known[last.path]
        if omitted is not None and omitted != known:
            raise TransportError(
                f"rank {self._transport.rank}: rank {source} omits {omitted.length_bytes} bytes of {slot.path.name} "
                f"({omitted.digest}), but {known.length_bytes} bytes are known here ({known.digest})"
            )
        slot.begin(expected)
        if last is not None and omitted is not None and self._known.get(slot.path) != omitted:
            slot.bulk[: omitted.length_bytes].copy_(last.bulk[: omitted.length_bytes])
        return slot
