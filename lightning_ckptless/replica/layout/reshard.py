"""Read a version at another world size than the one that wrote it.

The mapping of pieces to tensors is computed by torch.distributed.checkpoint's resharding, from the layout's metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.internals.torch_internals import foreach_copy
from lightning_ckptless.replica.layout.layout import Chunk, Layout, dtype_of, private_name
from lightning_ckptless.replica.layout.tensor_spec import Held


@dataclass(frozen=True)
class PieceRead:
    """A part of a piece and its destination.

    Args:
        chunk: the piece.
        name: name of the destination tensor.
        source: start of the part in the piece.
        target: start of the part in this rank's part of the tensor.
        sizes: sizes of the part.
    """

    chunk: Chunk
    name: str
    source: tuple[int, ...]
    target: tuple[int, ...]
    sizes: tuple[int, ...]


def plan_reads(layout: Layout, held: Mapping[str, Held], *, home: int) -> tuple[PieceRead, ...]:
    """Plan the reads that fill a rank's tensors from the pieces of a layout.

    Args:
        layout: layout of the version.
        held: the rank's part of each tensor.
        home: rank of the version whose private tensors it adopts.

    Raises:
        LayoutMismatchError: a tensor is not in the version, or has another dtype or shape there.
    """
    chunks = {(chunk.name, chunk.offsets): chunk for chunk in layout.chunks}
    known = layout.metadata.state_dict_metadata
    reads: list[PieceRead] = []
    for name, mine in held.items():
        theirs = name if name in known else private_name(home, name)
        there = known.get(theirs)
        _require_like(name, mine, there)
        assert isinstance(there, TensorStorageMetadata)
        box = ChunkStorageMetadata(torch.Size(mine.box.offsets), torch.Size(mine.box.sizes))
        for item in create_read_items_for_chunk_list(theirs, there, [box]):
            corner = tuple(item.storage_index.offset or ())
            chunk = chunks[theirs, corner]
            reads.append(
                PieceRead(chunk, name, tuple(item.storage_offsets), tuple(item.dest_offsets), tuple(item.lengths))
            )
    return tuple(reads)


def shards_in(reads: tuple[PieceRead, ...]) -> tuple[int, ...]:
    """The shards needed by the reads."""
    return tuple(sorted({read.chunk.shard for read in reads}))


def fill_resharded(
    reads: tuple[PieceRead, ...], bulks: Mapping[int, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> int:
    """Copy the parts into live tensors, in place.

    Args:
        reads: reads from `plan_reads`.
        bulks: tensor state of each needed shard: uint8 of shape [bulk bytes].
        tensors: live tensors by name; of a sharded tensor, the local part.

    Returns:
        Number of bytes copied.
    """
    sources, targets = [], []
    for read in reads:
        chunk = read.chunk
        piece = bulks[chunk.shard][chunk.at : chunk.at + chunk.nbytes].view(dtype_of(chunk.dtype)).view(chunk.sizes)
        sources.append(_part(piece, read.source, read.sizes))
        targets.append(_part(tensors[read.name].detach(), read.target, read.sizes))
    with torch.no_grad():
        foreach_copy(targets, sources)
    return sum(source.nbytes for source in sources)


def _part(tensor: torch.Tensor, corner: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(corner, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def _require_like(name: str, mine: Held, there: object) -> None:
    if not isinstance(there, TensorStorageMetadata):
        raise LayoutMismatchError(
            f"{name} is new: the version, of another world size, has no such tensor. Start the script unchanged"
        )
    found = str(there.properties.dtype), tuple(there.size)
    if found != (mine.dtype, mine.shape):
        raise LayoutMismatchError(
            f"{name} is {mine}, but in the version of another world size it is {found[0].removeprefix('torch.')}"
            f"{list(found[1])}: a tensor whose shape depends on the world size cannot be resharded"
        )
