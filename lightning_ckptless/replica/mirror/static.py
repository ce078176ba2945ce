"""The still part of a shard: tensors that seem to change seldom, such as frozen weights; only what differs is written.

A slot still holds what was written into it two versions ago. What the live tensors hold is compared with that at every
version, byte for byte by a digest of 128 bits, and only what differs is copied; a part of which nothing differs is not
sent to the holders either. So which tensors stand still is a guess that costs time where it is wrong, never a bit.

Nothing else would do. torch counts writes in place per tensor, but neither those through `.data`, with which averaged
copies of a model are often kept, nor those of fused optimizers on CPUs. That gradients are switched off says nothing
about either.

Reading is three times as fast as copying and checking. It takes a call per tensor, each of which may have to wait for
the interpreter lock, so small tensors, and those that cannot be read where they are, are copied with the rest and
compared afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from lightning_ckptless.replica.checksum import bytes_of, digest
from lightning_ckptless.replica.layout.layout import Chunk, aligned

ALGORITHM = "xxh3"
LEAST_BYTES = 64 * 1024
"""Below this, copying costs less than a call."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Target, source."""


@dataclass
class _Stretch:
    """Pieces side by side in a slot.

    Args:
        here: where they lie: uint8 of shape [bytes].
        live: the bytes that they are a copy of, where those can be read as they are; None where they are copied anyway.
        pair: how they are copied where they differ.
        digest: of what lies here; empty while that is not known.
    """

    here: torch.Tensor
    live: torch.Tensor | None = None
    pair: Pair | None = None
    digest: str = ""


class StaticPart:
    """The still part of the own shard in one slot.

    Args:
        chunks: its pieces, in the order of their places.
        bulk: the slot's tensor part: uint8 of shape [bulk bytes].
        pairs: how each piece is copied.
        late: whether each piece is copied beside the next batch.

    Attributes:
        compared: places of the pieces that are compared before they are copied; the others are copied anyway.
        compared_bytes: length of these.
        digest: of all of it; empty while that is not known.
    """

    def __init__(
        self, chunks: Sequence[Chunk], bulk: torch.Tensor, pairs: Sequence[Pair], late: Sequence[bool]
    ) -> None:
        live = [_readable(source) if is_late else None for (_, source), is_late in zip(pairs, late, strict=True)]
        self.compared = frozenset(place for place, found in enumerate(live) if found is not None)
        self.compared_bytes = sum(chunks[place].nbytes for place in self.compared)
        self.digest = ""
        self._stretches: list[_Stretch] = []
        self._here = bulk[: max((aligned(chunk.at + chunk.nbytes) for chunk in chunks), default=0)]
        for is_compared, places in groupby(range(len(chunks)), key=lambda place: place in self.compared):
            run = list(places)
            # What is copied anyway is looked at in one go, as far as it lies side by side.
            for first, last in zip(run, run, strict=True) if is_compared else [(run[0], run[-1])]:
                here = bulk[chunks[first].at : chunks[last].at + chunks[last].nbytes]
                self._stretches.append(_Stretch(here, live[first], pairs[first] if is_compared else None))

    def outdated(self) -> list[Pair]:
        """What has to be copied, beyond what is copied anyway. It counts as unknown until `settle`."""
        pairs = []
        for stretch in self._stretches:
            if stretch.live is None or stretch.pair is None:
                continue
            if not stretch.digest or _digest(stretch.live) != stretch.digest:
                stretch.digest = ""
                pairs.append(stretch.pair)
        return pairs

    def settle(self) -> bool:
        """Note what lies in the slot, after everything was copied. Whether that is what lay there the last time."""
        same = bool(self.digest)
        for stretch in self._stretches:
            if stretch.live is None or not stretch.digest:
                found = _digest(stretch.here)
                same = same and found == stretch.digest
                stretch.digest = found
        if not same:
            self.digest = _digest(self._here)
        return same

    def forget(self) -> None:
        """Have all of it written anew, so that damage in shared memory does not last."""
        self.digest = ""
        for stretch in self._stretches:
            stretch.digest = ""


def _readable(source: torch.Tensor) -> torch.Tensor | None:
    """The bytes of a live tensor; None where they are on a device, scattered, or few."""
    if source.nbytes < LEAST_BYTES or source.device.type != "cpu" or not source.is_contiguous():
        return None
    if source.is_conj() or source.is_neg():
        # Not yet what they stand for.
        return None
    return source.detach().reshape(-1).view(torch.uint8)


def _digest(data: torch.Tensor) -> str:
    return digest(ALGORITHM, [bytes_of(data)])
