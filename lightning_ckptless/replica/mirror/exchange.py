"""Shards on their way to holders, straight from slots into slots.

What a holder's slot holds already is not sent: the still part of a version that was sent into it before. Writer and
holder go through their two slots in step, as they learn the same of every round. So the writer knows what lies there by
what lies in its own slot; it says so beside the header, and the holder compares that with what it has noted.
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
from lightning_ckptless.replica.slot_pair import SlotPair
from lightning_ckptless.replica.slot_stamp import Stamp
from lightning_ckptless.replica.transport import Parcel, Transport, room, tensor_of

PAGE, BULK, BLOB = range(3)
"""Tags of the parcels of a round. A rank sends only its own shard, so a pair never has two of a kind."""

_NOTE = struct.Struct("!Q64s")
_PAGE_BYTES = HEADER_BYTES + _NOTE.size


@dataclass(frozen=True)
class Known:
    """The first bytes of a slot, where they are known from before.

    Args:
        length_bytes: how many; 0 where nothing is known.
        digest: of these bytes.
    """

    length_bytes: int = 0
    digest: str = ""

    def encode(self) -> bytes:
        """As it stands behind a header on its way to a holder."""
        return _NOTE.pack(self.length_bytes, self.digest.encode())

    @classmethod
    def decode(cls, data: bytes) -> Known:
        """What `encode` has written."""
        length_bytes, digest = _NOTE.unpack(data)
        return cls(length_bytes, digest.rstrip(b"\0").decode())


@dataclass(frozen=True)
class Shipment:
    """The own shard, ready to be sent.

    Args:
        slot: it lies here, sealed.
        blob: the host state.
        still: the still part, with its digest.
        is_there: whether the holders have the still part already.
    """

    slot: Slot
    blob: bytes
    still: Known
    is_there: bool

    @property
    def bulk(self) -> torch.Tensor:
        """What is sent of the tensor part."""
        return self.slot.bulk[self.still.length_bytes if self.is_there else 0 :]


class Delivery:
    """Sends the own shard to its holders, and receives those of the sources.

    Args:
        transport: between the ranks.
        holders: ranks that keep the own shard.
        slot_pairs: of all shards that this rank has, by shard.
    """

    def __init__(self, transport: Transport, holders: Sequence[int], slot_pairs: Mapping[int, SlotPair]) -> None:
        self._transport = transport
        self._holders = holders
        self._slot_pairs = {shard: slot_pair for shard, slot_pair in slot_pairs.items() if shard != transport.rank}
        self._known: dict[Path, Known] = {}
        self.sent_bytes = 0

    def exchange(self, own: Shipment | None, stamp_of: Callable[[int], Stamp]) -> dict[int, Slot]:
        """One round: send and receive.

        Args:
            own: the own shard; None where there is none this time.
            stamp_of: what a source's slot is to hold.

        Returns:
            The slots that hold the version now, by shard.

        Raises:
            TransportError: a peer is gone, or sends what was not expected.
        """
        sends: list[Parcel] = []
        if own is not None:
            parts = ((BULK, own.bulk), (BLOB, tensor_of(own.blob)))
            sends = [(holder, *part) for holder in self._holders for part in parts]
            self.sent_bytes += sum(parcel.numel() for _, _, parcel in sends)
        receives: list[Parcel] = []
        arriving: dict[int, tuple[Slot, SlotHeader, Known, torch.Tensor]] = {}
        for source, (header, still, is_there) in self._pages(own).items():
            slot = self._begin(source, header, stamp_of(source), still if is_there else None)
            blob = room(header.blob_bytes)
            receives += [(source, BULK, slot.bulk[still.length_bytes if is_there else 0 :]), (source, BLOB, blob)]
            arriving[source] = slot, header, still, blob
        self._transport.exchange(sends, receives)
        for slot, header, still, blob in arriving.values():
            slot.seal(replace(header.stamp, holder=self._transport.rank), bytes_of(blob), header.checksum)
            self._known[slot.path] = still
        kept = {source: slot for source, (slot, *_) in arriving.items()}
        return kept if own is None else {self._transport.rank: own.slot} | kept

    def _pages(self, own: Shipment | None) -> dict[int, tuple[SlotHeader, Known, bool]]:
        """Tell holders what is coming, and hear it from sources; an empty page says: nothing."""
        page = bytes(_PAGE_BYTES + 1)
        if own is not None:
            assert own.slot.header is not None
            page = own.slot.header.encode() + own.still.encode() + bytes([own.is_there])
        sent, pages = tensor_of(page), {source: room(len(page)) for source in self._slot_pairs}
        self._transport.exchange(
            [(holder, PAGE, sent) for holder in self._holders], [(source, PAGE, page) for source, page in pages.items()]
        )
        heard = {}
        for source, parcel in pages.items():
            data = bytes(bytes_of(parcel))
            header = SlotHeader.decode(data[:HEADER_BYTES])
            if header is not None:
                heard[source] = header, Known.decode(data[HEADER_BYTES:_PAGE_BYTES]), bool(data[_PAGE_BYTES])
        return heard

    def _begin(self, source: int, header: SlotHeader, expected: Stamp, already: Known | None) -> Slot:
        """Open a source's slot for what is coming.

        Args:
            source: whose.
            header: as it was sent.
            expected: what it should say.
            already: what the source takes to be there.
        """
        slot, sent = self._slot_pairs[source].free(), replace(expected, holder=source)
        if header.stamp != sent or header.bulk_bytes != slot.bulk_bytes:
            raise TransportError(
                f"rank {self._transport.rank}: rank {source} sends {header.stamp} of {header.bulk_bytes} bytes, "
                f"expected {sent} of {slot.bulk_bytes} bytes"
            )
        known = self._known.pop(slot.path, Known())
        if already is not None and already != known:
            raise TransportError(
                f"rank {self._transport.rank}: rank {source} leaves out {already.length_bytes} bytes that should be in "
                f"{slot.path.name} ({already.digest}), where {known.length_bytes} bytes are known ({known.digest})"
            )
        slot.begin(expected)
        return slot
