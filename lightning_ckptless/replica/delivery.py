"""Shards on their way to keepers, straight from slots into slots.

What a keeper's slot holds already is not sent: the still part of a version that was sent into it before. Writer and
keeper go through their two slots in step, as they learn the same of every round. So the writer knows what lies there by
what lies in its own slot; it says so beside the header, and the keeper compares that with what it has noted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lightning_ckptless.errors import TransportError
from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.shelf import Shelf
from lightning_ckptless.replica.slot import HEADER_BYTES, Slot, SlotHeader
from lightning_ckptless.replica.stamp import Stamp
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
        """As it stands behind a header on its way to a keeper."""
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
        blob: the small state.
        still: the still part, with its digest.
        is_there: whether the keepers have the still part already.
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
    """Sends the own shard to its keepers, and receives those of the wards.

    Args:
        transport: between the ranks.
        keepers: ranks that keep the own shard.
        shelves: of all shards that this rank has, by shard.
    """

    def __init__(self, transport: Transport, keepers: Sequence[int], shelves: Mapping[int, Shelf]) -> None:
        self._transport = transport
        self._keepers = keepers
        self._shelves = {shard: shelf for shard, shelf in shelves.items() if shard != transport.rank}
        self._known: dict[Path, Known] = {}
        self.sent_bytes = 0

    def exchange(self, own: Shipment | None, stamp_of: Callable[[int], Stamp]) -> dict[int, Slot]:
        """One round: send and receive.

        Args:
            own: the own shard; None where there is none this time.
            stamp_of: what a ward's slot is to hold.

        Returns:
            The slots that hold the version now, by shard.

        Raises:
            TransportError: a peer is gone, or sends what was not expected.
        """
        sends: list[Parcel] = []
        if own is not None:
            parts = ((BULK, own.bulk), (BLOB, tensor_of(own.blob)))
            sends = [(keeper, *part) for keeper in self._keepers for part in parts]
            self.sent_bytes += sum(parcel.numel() for _, _, parcel in sends)
        receives: list[Parcel] = []
        arriving: dict[int, tuple[Slot, SlotHeader, Known, torch.Tensor]] = {}
        for ward, (header, still, is_there) in self._pages(own).items():
            slot = self._begin(ward, header, stamp_of(ward), still if is_there else None)
            blob = room(header.blob_bytes)
            receives += [(ward, BULK, slot.bulk[still.length_bytes if is_there else 0 :]), (ward, BLOB, blob)]
            arriving[ward] = slot, header, still, blob
        self._transport.exchange(sends, receives)
        for slot, header, still, blob in arriving.values():
            slot.seal(replace(header.stamp, keeper=self._transport.rank), bytes_of(blob), header.checksum)
            self._known[slot.path] = still
        kept = {ward: slot for ward, (slot, *_) in arriving.items()}
        return kept if own is None else {self._transport.rank: own.slot} | kept

    def _pages(self, own: Shipment | None) -> dict[int, tuple[SlotHeader, Known, bool]]:
        """Tell keepers what is coming, and hear it from wards; an empty page says: nothing."""
        page = bytes(_PAGE_BYTES + 1)
        if own is not None:
            assert own.slot.header is not None
            page = own.slot.header.encode() + own.still.encode() + bytes([own.is_there])
        sent, pages = tensor_of(page), {ward: room(len(page)) for ward in self._shelves}
        self._transport.exchange(
            [(keeper, PAGE, sent) for keeper in self._keepers], [(ward, PAGE, page) for ward, page in pages.items()]
        )
        heard = {}
        for ward, parcel in pages.items():
            data = bytes(bytes_of(parcel))
            header = SlotHeader.decode(data[:HEADER_BYTES])
            if header is not None:
                heard[ward] = header, Known.decode(data[HEADER_BYTES:_PAGE_BYTES]), bool(data[_PAGE_BYTES])
        return heard

    def _begin(self, ward: int, header: SlotHeader, expected: Stamp, already: Known | None) -> Slot:
        """Open a ward's slot for what is coming.

        Args:
            ward: whose.
            header: as it was sent.
            expected: what it should say.
            already: what the ward takes to be there.
        """
        slot, sent = self._shelves[ward].free(), replace(expected, keeper=ward)
        if header.stamp != sent or header.bulk_bytes != slot.bulk_bytes:
            raise TransportError(
                f"rank {self._transport.rank}: rank {ward} sends {header.stamp} of {header.bulk_bytes} bytes, "
                f"expected {sent} of {slot.bulk_bytes} bytes"
            )
        known = self._known.pop(slot.path, Known())
        if already is not None and already != known:
            raise TransportError(
                f"rank {self._transport.rank}: rank {ward} leaves out {already.length_bytes} bytes that should be in "
                f"{slot.path.name} ({already.digest}), where {known.length_bytes} bytes are known ({known.digest})"
            )
        slot.begin(expected)
        return slot
