"""The static part of a shard: tensors expected not to change, such as frozen weights. Only changed data is written.

A slot still contains what was written into it before. At every version the live tensors are compared with that by a
128-bit digest, and only tensors that differ are copied. What a holder cannot copy from its own tensors is not sent to
it again either while the static part is the same. So a wrong guess about which tensors are static costs time, but never
correctness.

Cheaper criteria do not suffice. torch counts in-place writes per tensor, but neither writes through `.data`, which are
common for averaged copies of a model, nor those of fused optimizers on CPUs. Disabled gradients do not exclude either.

Reading is three times as fast as copying and computing a checksum. But it needs a call per tensor, each of which may
wait for the interpreter lock. So small tensors, and tensors that cannot be read in place, are copied with the rest and
compared afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from lightning_ckptless.replica.checksum import bytes_of, digest, in_place
from lightning_ckptless.replica.layout.layout import Chunk

ALGORITHM = "xxh3"
LEAST_BYTES = 64 * 1024
"""Below this size copying costs less than a call."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Target, source."""


@dataclass
class _Span:
    """Consecutive pieces in a slot.

    Args:
        in_slot: their bytes in the slot: uint8 of shape [bytes].
        live: the bytes of the live tensor, if it can be read in place; None if the pieces are always copied.
        pair: the copy to make if they differ.
        digest: digest of the bytes in the slot; empty while unknown.
    """

    in_slot: torch.Tensor
    live: torch.Tensor | None = None
    pair: Pair | None = None
    digest: str = ""


class StaticPart:
    """The static part of a shard in one slot.

    Args:
        chunks: its pieces that this rank's tensors contain, ordered by offset.
        in_slot: the bytes of the whole part in the slot: uint8 of shape [static bytes].
        pairs: target and source of each piece.
        late: whether each piece is copied late.

    Attributes:
        compared: indices of the pieces that are compared before they are copied; the others are always copied.
        compared_bytes: total length of the compared pieces.
        digest: digest of the whole static part; empty while unknown.
    """

    def __init__(
        self, chunks: Sequence[Chunk], in_slot: torch.Tensor, pairs: Sequence[Pair], late: Sequence[bool]
    ) -> None:
        live = [_readable(source) if is_late else None for (_, source), is_late in zip(pairs, late, strict=True)]
        self.compared = frozenset(index for index, readable in enumerate(live) if readable is not None)
        self.compared_bytes = sum(chunks[index].nbytes for index in self.compared)
        self.digest = ""
        self._spans: list[_Span] = []
        self._in_slot = in_slot
        for is_compared, group in groupby(range(len(chunks)), key=lambda index: index in self.compared):
            run = list(group)
            # Consecutive pieces that are always copied are digested in one call.
            for first, last in zip(run, run, strict=True) if is_compared else [(run[0], run[-1])]:
                span = in_slot[chunks[first].at : chunks[last].at + chunks[last].nbytes]
                self._spans.append(_Span(span, live[first], pairs[first] if is_compared else None))

    def outdated(self) -> list[Pair]:
        """The compared pieces that have to be copied. Their digests are unknown until `settle`."""
        pairs = []
        for span in self._spans:
            if span.live is None or span.pair is None:
                continue
            if not span.digest or _digest(span.live) != span.digest:
                span.digest = ""
                pairs.append(span.pair)
        return pairs

    def settle(self) -> None:
        """Record the contents of the slot after everything is copied."""
        same = bool(self.digest)
        for span in self._spans:
            if span.live is None or not span.digest:
                found = _digest(span.in_slot)
                same = same and found == span.digest
                span.digest = found
        if not same:
            self.digest = _digest(self._in_slot)

    def received(self) -> None:
        """Take note that pieces which this rank's tensors do not contain were written into the slot."""
        self.digest = ""

    def forget(self) -> None:
        """Force all pieces to be written again, so that damage in shared memory is repaired."""
        self.digest = ""
        for span in self._spans:
            span.digest = ""


def _readable(source: torch.Tensor) -> torch.Tensor | None:
    """The bytes of a live tensor; None if it is small, or cannot be read in place."""
    return in_place(source) if source.nbytes >= LEAST_BYTES else None


def _digest(data: torch.Tensor) -> str:
    return digest(ALGORITHM, [bytes_of(data)])
