"""The round of one version of the device tier: host states are exchanged, and the ranks vote.

It runs in the mirror thread.

    first vote    has every device ended the step?
    exchange      host state and early pieces, to the holders of the shard
    second vote   does every rank have what it needs?

One vote would not do: a rank that is lost right after it has voted may leave another one behind whose device has not
ended the step, and which votes later. An outcome of the second vote shows that all processes were alive when the last
device had ended the step. See `protocol.device_tier`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lightning_ckptless.protocol.versions import Snapshot
from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.device_tier.device_plan import DevicePlan, counters
from lightning_ckptless.replica.mirror.moment import Moment
from lightning_ckptless.replica.transport import Message, Transport, receive_buffer, tensor_of

_LENGTH = struct.Struct("!Q")
_SIZE, _BLOB, _EARLY = range(3)
"""Tags of the messages. A rank sends only its own shard, so tags are unique between two ranks."""


@dataclass(frozen=True)
class HostPart:
    """The part of a shard that is in host memory.

    Args:
        blob: the host state of its rank.
        early: the early pieces one after another: uint8 of shape [bytes].
    """

    blob: bytes
    early: torch.Tensor


@dataclass
class LiveVersion:
    """A version in the live tensors, until they may change.

    Args:
        snapshot: the version.
        plan: what is kept of it.
        tensors: this rank's live tensors by name.
        counts: torch's counts of writes to the watched ones at the commit point.
        early: copies of the early pieces of the own shard.
        blob: this rank's host state, or a function that returns it in the mirror thread.
        ready: CUDA event after which the tensors contain the version; None in host memory.

    Attributes:
        parts: the host parts that this rank has, by shard.
        known: done when this rank knows that all have voted.
    """

    snapshot: Snapshot
    plan: DevicePlan
    tensors: Mapping[str, torch.Tensor]
    counts: list[int]
    early: list[torch.Tensor]
    blob: bytes | Callable[[], bytes]
    ready: torch.cuda.Event | None
    parts: dict[int, HostPart] = field(default_factory=dict)
    known: Moment = field(default_factory=Moment)

    @property
    def rank(self) -> int:
        """This rank."""
        return self.plan.rank

    @property
    def is_known(self) -> bool:
        """Whether this rank knows that all have voted."""
        return self.known.is_reached and self.known.error is None

    def changed(self) -> str | None:
        """Name of a live tensor that was written to since the commit point; None if there is none."""
        now = counters(self.plan.watched, self.tensors)
        return next((n for n, a, b in zip(self.plan.watched, self.counts, now, strict=True) if a != b), None)


class Delivery:
    """One round.

    Args:
        live: the version.
        transport: transport that only this round uses while it runs.
        holders: ranks that keep this rank's shard.
        when_known: called when this rank knows that all have voted.
    """

    def __init__(
        self, live: LiveVersion, transport: Transport, holders: Sequence[int], when_known: Callable[[], None]
    ) -> None:
        self._live = live
        self._transport = transport
        self._holders = holders
        self._when_known = when_known

    @property
    def ended(self) -> Moment:
        """Done when this rank knows that all have voted."""
        return self._live.known

    def run(self) -> None:
        """Deliver the host state and vote.

        Raises:
            TransportError: a peer is lost.
        """
        live = self._live
        if live.ready is not None:
            live.ready.synchronize()
        own = HostPart(live.blob if isinstance(live.blob, bytes) else live.blob(), _packed(live.early))
        live.parts[live.plan.rank] = own
        self._transport.agree(True)
        self._exchange(own)
        self._transport.agree(True)
        live.known.reach()
        self._when_known()

    def fail(self, error: BaseException) -> None:
        """Raise an error in the thread that waits for the round."""
        if not self._live.known.is_reached:
            self._live.known.reach(error)

    def _exchange(self, own: HostPart) -> None:
        live, plan = self._live, self._live.plan
        sources = [shard for shard in plan.shards if shard != plan.rank]
        sizes = {source: receive_buffer(_LENGTH.size) for source in sources}
        mine = tensor_of(_LENGTH.pack(len(own.blob)))
        self._transport.exchange(
            [(holder, _SIZE, mine) for holder in self._holders], [(s, _SIZE, size) for s, size in sizes.items()]
        )
        parts = ((_BLOB, tensor_of(own.blob)), (_EARLY, own.early))
        sends: list[Message] = [(holder, *part) for holder in self._holders for part in parts]
        arriving = {
            source: (receive_buffer(_LENGTH.unpack(bytes_of(size))[0]), receive_buffer(plan.early_bytes(source)))
            for source, size in sizes.items()
        }
        receives: list[Message] = []
        for source, (blob, early) in arriving.items():
            receives += [(source, _BLOB, blob), (source, _EARLY, early)]
        self._transport.exchange(sends, receives)
        for source, (blob, early) in arriving.items():
            live.parts[source] = HostPart(bytes(bytes_of(blob)), early)


def _packed(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pieces one after another, in host memory. Those on a device are complete: no later work is waited for."""
    if not pieces:
        return receive_buffer(0)
    device = next((piece.device for piece in pieces if piece.is_cuda), None)
    stream = None if device is None else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        # The stored bytes of a lazy conjugate or negation are not its values.
        plain = [piece.cpu().resolve_conj().resolve_neg().contiguous() for piece in pieces]
        return torch.cat([piece.reshape(-1).view(torch.uint8) for piece in plain])
