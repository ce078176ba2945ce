"""Copies of many pieces into a slot, in as few calls as possible.

Copying a tensor costs a microsecond in torch's dispatcher, whatever its size. Small pieces that lie side by side in a
slot are instead concatenated into it, which takes a third of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_ckptless.replica.checksum import in_place
from lightning_ckptless.replica.layout.layout import Chunk, aligned

SMALL_BYTES = 64 * 1024
"""From this size on, the call takes less than the copy, which torch may divide among threads."""


@dataclass(frozen=True)
class LatePiece:
    """A piece that is copied late.

    Args:
        chunk: the piece.
        name: name of its tensor.
        target: view of the slot.
        source: view of the live tensor.
    """

    chunk: Chunk
    name: str
    target: torch.Tensor
    source: torch.Tensor


@dataclass
class _Run:
    """Small pieces side by side.

    Args:
        at: byte offset in the slot's bulk.
        end: byte offset of the end of the last piece.
        pieces: the pieces.
        parts: their bytes, and the padding between them.
    """

    at: int
    end: int
    pieces: list[LatePiece]
    parts: list[torch.Tensor]

    def add(self, piece: LatePiece, data: torch.Tensor) -> None:
        if gap_bytes := piece.chunk.at - self.end:
            # A script may have chosen another default device.
            self.parts.append(torch.zeros(gap_bytes, dtype=torch.uint8, device="cpu"))
        self.pieces.append(piece)
        self.parts.append(data)
        self.end = piece.chunk.at + piece.chunk.nbytes


class CopyBatch:
    """Copies that are made together.

    Args:
        bulk: tensor state of the slot.
        pieces: the pieces, ordered by offset.

    Attributes:
        targets: views of the slot that are copied one by one.
        sources: their live views.
    """

    def __init__(self, bulk: torch.Tensor, pieces: Sequence[LatePiece]) -> None:
        runs: list[_Run] = []
        apart = []
        for piece in pieces:
            data = in_place(piece.source) if piece.source.nbytes < SMALL_BYTES else None
            if data is None:
                apart.append(piece)
                continue
            # Between two of this batch, there may be pieces of other ranks.
            if not runs or aligned(runs[-1].end) != piece.chunk.at:
                runs.append(_Run(piece.chunk.at, piece.chunk.at, [], []))
            runs[-1].add(piece, data)
        apart += [run.pieces[0] for run in runs if len(run.pieces) == 1]
        self.targets = [piece.target for piece in apart]
        self.sources = [piece.source for piece in apart]
        self._runs = [(run.parts, bulk[run.at : run.end]) for run in runs if len(run.pieces) > 1]

    def concatenate(self) -> None:
        """Copy all pieces that are not copied one by one."""
        for parts, into in self._runs:
            torch.cat(parts, out=into)
