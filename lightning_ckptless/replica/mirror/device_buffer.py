"""A buffer in device memory: a shard is copied into it at the speed of the device, and from there into a slot.

The slots of a ring are in host memory, at the other end of a bus that needs several steps for a large state. While the
live tensors are the source of that copy, the next optimizer step has to wait for its end. With `staging="device"` they
are copied within the device first, on the stream on which the optimizer runs, and may change as soon as that copy is
queued. The copy over the bus and its checksum then overlap with as many steps as they take; the next version waits for
them, since it needs the buffer.

On CPU ranks, where the same code runs, the buffer is in the memory of the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from lightning_ckptless.internals.torch_internals import foreach_copy
from lightning_ckptless.replica.layout.layout import Chunk, aligned, slot_view
from lightning_ckptless.replica.mirror.static import Pair


class DeviceBuffer:
    """Memory for the pieces of one shard.

    Args:
        chunks: the pieces, ordered by offset.
        bulk_bytes: length of the shard's tensor state.
        device: where the buffer is.

    Attributes:
        chunks: the pieces.
    """

    def __init__(self, chunks: Sequence[Chunk], bulk_bytes: int, device: torch.device) -> None:
        self.chunks = tuple(chunks)
        # Zeros, as in a new slot: the bytes between two pieces are part of the checksum.
        self._bulk = torch.zeros(bulk_bytes, dtype=torch.uint8, device=device)
        self._targets = [slot_view(chunk, self._bulk) for chunk in chunks]
        self._spans = joined_spans(chunks)

    def fill(self, sources: Sequence[torch.Tensor]) -> None:
        """Copy the pieces into the buffer, on the current stream of the device.

        Args:
            sources: views of the live tensors, one per piece.
        """
        with torch.no_grad():
            foreach_copy(self._targets, list(sources), non_blocking=True)

    def copies_into(self, bulk: torch.Tensor) -> list[Pair]:
        """The copies from the buffer that complete a slot; as few as possible, since each is an operation of the bus.

        Args:
            bulk: tensor state of the slot.
        """
        return [(bulk[span], self._bulk[span]) for span in self._spans]


def joined_spans(chunks: Sequence[Chunk]) -> list[slice]:
    """The parts of a shard's bulk that pieces occupy; those that follow each other form one part.

    Args:
        chunks: the pieces, ordered by offset.
    """
    spans: list[slice] = []
    for chunk in chunks:
        end = aligned(chunk.at + chunk.nbytes)
        if spans and spans[-1].stop == chunk.at:
            spans[-1] = slice(spans[-1].start, end)
        elif chunk.nbytes:
            spans.append(slice(chunk.at, end))
    return spans


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device:
    """The device of the first tensor that is on one; host memory if none is.

    Args:
        tensors: tensors of a state.
    """
    return next((tensor.device for tensor in tensors if tensor.is_cuda), torch.device("cpu"))
