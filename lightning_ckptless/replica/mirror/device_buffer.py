"""A buffer in device memory: a shard is copied into it at the speed of the device, and from there into a slot.

Slots are in host memory, and copying a large state over the bus takes several steps. While the live tensors are the
source of that copy, the next optimizer step has to wait for its end. With `staging="device"` they are copied within the
device first, on the stream on which the optimizer runs, and may change as soon as that copy is queued. The copy over
the bus and its checksum then overlap with as many steps as they take; the next version waits for them, since it needs
the buffer.

On CPU ranks, where the same code runs, the buffer is in the memory of the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from lightning_ckptless.internals.torch_internals import foreach_copy
from lightning_ckptless.replica.device_tier.device_space import DeviceNeed
from lightning_ckptless.replica.layout.layout import Chunk, Layout, aligned, pieces_for, slot_view
from lightning_ckptless.replica.mirror.static import Pair


class DeviceBuffer:
    """Memory for the pieces of one shard.

    Args:
        chunks: the pieces that are copied, ordered by offset; there is no memory for the others.
        device: where the buffer is.

    Attributes:
        chunks: the pieces.
    """

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        self.chunks = tuple(chunks)
        self._spans: list[slice] = []
        self._parts: list[torch.Tensor] = []
        self._targets: list[torch.Tensor] = []
        for span, joined in joined_spans(chunks):
            # Zeros, as in a new slot: the bytes between two pieces are part of the checksum.
            part = torch.zeros(span.stop - span.start, dtype=torch.uint8, device=device)
            self._spans.append(span)
            self._parts.append(part)
            self._targets += [slot_view(replace(chunk, at=chunk.at - span.start), part) for chunk in joined]

    def fill(self, sources: Sequence[torch.Tensor]) -> None:
        """Copy the pieces into the buffer, on the current stream of the device.

        Args:
            sources: views of the live tensors, one per piece.
        """
        with torch.no_grad():
            foreach_copy(self._targets, list(sources), non_blocking=True)

    def copies_into(self, bulk: torch.Tensor) -> list[Pair]:
        """The copies from the buffer that complete a slot; as few as possible, since each is a separate transfer.

        Args:
            bulk: tensor state of the slot.
        """
        return [(bulk[span], part) for span, part in zip(self._spans, self._parts, strict=True)]


def joined_spans(chunks: Sequence[Chunk]) -> list[tuple[slice, list[Chunk]]]:
    """The parts of a shard's bulk that pieces occupy, each with its pieces; those that follow each other form one part.

    Args:
        chunks: the pieces, ordered by offset.
    """
    spans: list[tuple[slice, list[Chunk]]] = []
    for chunk in chunks:
        end = aligned(chunk.at + chunk.nbytes)
        if spans and spans[-1][0].stop == chunk.at:
            span, joined = spans[-1]
            joined.append(chunk)
            spans[-1] = slice(span.start, end), joined
        else:
            spans.append((slice(chunk.at, end), [chunk]))
    return spans


def buffer_need(layout: Layout, rank: int, sources: Sequence[int]) -> DeviceNeed:
    """The device memory of the buffers for `staging="device"`.

    Args:
        layout: layout of the state.
        rank: this rank.
        sources: ranks whose shards it keeps, and copies as far as its own tensors contain them.
    """
    sizes = [sum(aligned(chunk.nbytes) for chunk in pieces_for(layout, shard, rank)) for shard in (rank, *sources)]
    return DeviceNeed("staging='device'", "staging='overlap'", "the buffers", sum(sizes), sum(map(bool, sizes)))


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device:
    """The device of the first tensor that is on one; host memory if none is.

    Args:
        tensors: tensors of a state.
    """
    return next((tensor.device for tensor in tensors if tensor.is_cuda), torch.device("cpu"))
