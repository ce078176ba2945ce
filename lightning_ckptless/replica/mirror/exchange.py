"""Transfer shards from the slots of their writers into the slots of their holders.

Of each shard, only the spans that its holder does not fill itself are sent. Those in the static part are not sent if
they are what the holder received in the round before. The writer sends the digest of the static part with the header. A
holder whose slot does not contain these spans yet copies them from the slot that it wrote last: which slots two ranks
write differs once one of them has lost its history.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lightning_ckptless.errors import TransportError
from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.slot import HEADER_BYTES, Slot, SlotHeader
from lightning_ckptless.replica.slot_ring import SlotRing
from lightning_ckptless.replica.slot_stamp import Stamp
from lightning_ckptless.replica.transport import Message, Transport, receive_buffer, tensor_of

PAGE, BLOB, AUDIT, SPANS = range(4)
"""Tags of the messages of a round; the spans have the following ones too. A rank sends only its own shard, so tags are
unique between two ranks."""

_PREFIX = struct.Struct("!Q64s")
_PREFIXED_BYTES = HEADER_BYTES + _PREFIX.size
_PAGE_BYTES = _PREFIXED_BYTES + 1


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


@dataclass(frozen=True)
class Page:
    """What a source announces before it sends its shard.

    Args:
        header: header of the source's slot.
        static: the static part.
        omits_static: whether the spans of the static part are not sent.
    """

    header: SlotHeader
    static: KnownPrefix
    omits_static: bool

    def encode(self) -> bytes:
        """Serialize, to a fixed length."""
        return self.header.encode() + self.static.encode() + bytes([self.omits_static])

    @classmethod
    def decode(cls, data: bytes) -> Page | None:
        """Parse the result of `encode`; None if the source has no shard in this round."""
        header = SlotHeader.decode(data[:HEADER_BYTES])
        static = data[HEADER_BYTES:_PREFIXED_BYTES]
        return None if header is None else cls(header, KnownPrefix.decode(static), bool(data[_PREFIXED_BYTES]))


@dataclass(frozen=True)
class ArrivedShard:
    """What has arrived of a source's shard. The slot contains it, but is not sealed.

    Args:
        slot: the slot.
        page: what the source has announced.
        wrote_static: whether spans of the static part were written into the slot.
        blob: the host state of the source.
    """

    slot: Slot
    page: Page
    wrote_static: bool
    blob: torch.Tensor = field(repr=False)


class ShardExchange:
    """Sends this rank's shard to its holders and receives the shards of its sources.

    Args:
        transport: transport between the ranks.
        holders: ranks that keep this rank's shard.
        rings: slot rings of this rank, by shard.
        spans: returns the spans of a shard's bulk that are sent to a holder, given both.
    """

    def __init__(
        self,
        transport: Transport,
        holders: Sequence[int],
        rings: Mapping[int, SlotRing],
        spans: Callable[[int, int], Sequence[slice]],
    ) -> None:
        self._transport = transport
        self._rings = {shard: ring for shard, ring in rings.items() if shard != transport.rank}
        self._to = {holder: spans(transport.rank, holder) for holder in holders}
        self._from = {source: spans(source, transport.rank) for source in self._rings}
        self._sent = KnownPrefix()
        self._last: dict[int, Slot] = {}
        self._known: dict[Path, KnownPrefix] = {}
        self.sent_bytes = 0

    def exchange(
        self,
        own: OutgoingShard | None,
        begun: Mapping[int, Slot],
        stamp_of: Callable[[int], Stamp],
        audits: tuple[Sequence[Message], Sequence[Message]] = ((), ()),
    ) -> dict[int, ArrivedShard]:
        """Send and receive the shards of one round.

        Args:
            own: this rank's shard; None if it has none in this round.
            begun: slots for shards of sources that this rank has begun to fill itself, by shard.
            stamp_of: expected stamp of a source's shard.
            audits: short messages to send and to receive together with the headers.

        Returns:
            What has arrived, by shard.

        Raises:
            TransportError: a peer is lost or sends unexpected data.
        """
        if not (self._to or self._rings or any(audits)):
            return {}
        page = None
        sends: list[Message] = []
        if own is not None:
            assert own.slot.header is not None
            page = Page(own.slot.header, own.static, own.static == self._sent and not own.repeats_static)
            self._sent, blob = own.static, tensor_of(own.blob)
            for holder, spans in self._to.items():
                sends += [(holder, BLOB, blob), *_messages(holder, spans, own.slot, page)]
            self.sent_bytes += sum(data.numel() for _, _, data in sends)
        receives: list[Message] = []
        arriving: dict[int, ArrivedShard] = {}
        for source, announced in self._pages(page, audits).items():
            arrived = arriving[source] = self._begin(source, announced, stamp_of(source), begun.get(source))
            receives += [
                (source, BLOB, arrived.blob),
                *_messages(source, self._from[source], arrived.slot, announced),
            ]
        self._transport.exchange(sends, receives)
        for source, arrived in arriving.items():
            self._known[arrived.slot.path] = arrived.page.static
            self._last[source] = arrived.slot
        return arriving

    def _pages(self, own: Page | None, audits: tuple[Sequence[Message], Sequence[Message]]) -> dict[int, Page]:
        """Send the page to holders and receive those of sources; an empty page announces no shard."""
        sent = tensor_of(bytes(_PAGE_BYTES) if own is None else own.encode())
        pages = {source: receive_buffer(_PAGE_BYTES) for source in self._rings}
        self._transport.exchange(
            [*((holder, PAGE, sent) for holder in self._to), *audits[0]],
            [*((source, PAGE, page) for source, page in pages.items()), *audits[1]],
        )
        announced = {source: Page.decode(bytes(bytes_of(page))) for source, page in pages.items()}
        return {source: page for source, page in announced.items() if page is not None}

    def _begin(self, source: int, page: Page, expected: Stamp, begun: Slot | None) -> ArrivedShard:
        """Begin to overwrite the slot for a source's shard, and write what the source omits.

        Args:
            source: rank of the shard.
            page: what it announces.
            expected: expected stamp.
            begun: the slot, if this rank fills a part of it itself.
        """
        slot = self._rings[source].free() if begun is None else begun
        header, static, sent = page.header, page.static, replace(expected, holder=source)
        if header.stamp != sent or header.bulk_bytes != slot.bulk_bytes:
            raise TransportError(
                f"rank {self._transport.rank}: rank {source} sends {header.stamp} of {header.bulk_bytes} bytes, "
                f"expected {sent} of {slot.bulk_bytes} bytes"
            )
        last = self._last.get(source)
        known = KnownPrefix() if last is None else self._known[last.path]
        if page.omits_static and static != known:
            raise TransportError(
                f"rank {self._transport.rank}: rank {source} omits {static.length_bytes} bytes of {slot.path.name} "
                f"({static.digest}), but {known.length_bytes} bytes are known here ({known.digest})"
            )
        if begun is None:
            slot.begin(expected)
        in_static = [span for span in self._from[source] if span.stop <= static.length_bytes]
        wrote = bool(in_static) and not (page.omits_static and self._known.get(slot.path) == static)
        if last is not None and page.omits_static and wrote:
            for span in in_static:
                slot.bulk[span].copy_(last.bulk[span])
        return ArrivedShard(slot, page, wrote, receive_buffer(header.blob_bytes))


def _messages(peer: int, spans: Sequence[slice], slot: Slot, page: Page) -> list[Message]:
    """The messages that carry spans of a slot to or from a peer."""
    return [
        (peer, SPANS + number, slot.bulk[span])
        for number, span in enumerate(spans)
        if not (page.omits_static and span.stop <= page.static.length_bytes)
    ]
