"""How the state is cut into shards: which piece of which tensor lies where, and which ranks have a use for it.

What all ranks hold alike is divided over them; of what is sharded already each piece lies with a rank that holds it;
what a rank holds alone is a part of its own shard, under the name `rank<r>/<name>`. A layout is the metadata that any
reader of torch.distributed.checkpoint understands, and is the same bytes on all ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.formats.schema import MOST_RANKS, SchemaError, boolean, integer, record, sequence, text
from lightning_ckptless.formats.sealed import parse
from lightning_ckptless.replica.layout.tensor_spec import Box, Described, Held, differences, held_by_name
from lightning_ckptless.replica.slot_stamp import BYTES, RANK, WORLD_SIZE

FORMAT = 1
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where it lies.

    Args:
        name: name of the tensor in the plan.
        dtype: such as `torch.float32`.
        shape: sizes of the whole tensor.
        offsets: corner of the box.
        sizes: sizes of the box.
        shard: shard that the box belongs to.
        at: byte offset in the shard's bulk, a multiple of 64.
        nbytes: length.
        holders: ranks whose tensors hold the box; empty where all do.
        still: whether the tensor seems to change seldom: such pieces come first in the bulk.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shard: int
    at: int
    nbytes: int
    holders: tuple[int, ...] = ()
    still: bool = False

    def is_held_by(self, rank: int) -> bool:
        """Whether a rank's tensors hold the box."""
        return not self.holders or rank in self.holders


def dtype_of(name: str) -> torch.dtype:
    """The dtype with a name such as `torch.float32`.

    Raises:
        ValueError: torch has none of that name.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of this torch")
    return dtype


def private_name(rank: int, name: str) -> str:
    """Name in the plan of a tensor that one rank holds alone."""
    return f"rank{rank}/{name}"


class Layout:
    """Where each piece of the state lies in the shards.

    Args:
        chunks: the pieces, ordered by shard and place.
        world_size: number of shards.

    Attributes:
        digest: sha256 of the layout: equal on all ranks and over relaunches of the same script.
    """

    def __init__(self, chunks: Sequence[Chunk], world_size: int) -> None:
        self.chunks = tuple(chunks)
        self.world_size = world_size
        self._by_shard = tuple(tuple(c for c in self.chunks if c.shard == s) for s in range(world_size))
        self._held: dict[int, dict[str, Held]] = {}
        # `vars` where `dataclasses.asdict` would do as well: in a relaunch that took a tenth of a second.
        fields = {
            "format": FORMAT,
            "world_size": world_size,
            "chunks": [_fields(chunk) for chunk in self.chunks],
        }
        self._bytes = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        self.digest = hashlib.sha256(self._bytes).hexdigest()

    def of(self, shard: int) -> tuple[Chunk, ...]:
        """The pieces of a shard, in the order of their places."""
        return self._by_shard[shard]

    def bulk_bytes(self, shard: int) -> int:
        """Length of a shard's tensor part."""
        return max((aligned(chunk.at + chunk.nbytes) for chunk in self.of(shard)), default=0)

    def still_bytes(self, shard: int) -> int:
        """Length of the part that seems to change seldom, at the beginning of a shard's tensor part."""
        return max((aligned(chunk.at + chunk.nbytes) for chunk in self.of(shard) if chunk.still), default=0)

    def held_by(self, rank: int) -> Mapping[str, Held]:
        """What a rank holds of each tensor, by its name there; without those of which it holds nothing."""
        if rank not in self._held:
            self._held[rank] = _held(self.chunks, rank)
        return self._held[rank]

    def known_to(self, rank: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and whole shape of every tensor, by its name on a rank; without those that other ranks hold alone."""
        others = tuple(private_name(other, "") for other in range(self.world_size) if other != rank)
        return {
            local_name(chunk, rank): (dtype_of(chunk.dtype), chunk.shape)
            for chunk in self.chunks
            if not chunk.name.startswith(others)
        }

    @cached_property
    def need(self) -> dict[int, tuple[int, ...]]:
        """The shards in which each rank finds all that it holds."""
        need: dict[int, set[int]] = {rank: set() for rank in range(self.world_size)}
        for chunk in self.chunks:
            for rank in chunk.holders or need:
                need[rank].add(chunk.shard)
        return {rank: tuple(sorted(shards)) for rank, shards in need.items()}

    @cached_property
    def metadata(self) -> Metadata:
        """The layout as torch.distributed.checkpoint describes a checkpoint."""
        plans = [SavePlan([write_item(c) for c in self.of(shard)]) for shard in range(self.world_size)]
        return DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)[1]

    def to_bytes(self) -> bytes:
        """The layout as JSON, the same bytes for the same layout."""
        return self._bytes

    @classmethod
    def from_bytes(cls, data: bytes, digest: str) -> Layout:
        """The layout that `to_bytes` wrote.

        Args:
            data: the bytes.
            digest: of the layout that is expected.

        Raises:
            SchemaError: the bytes are damaged, or those of something else.
        """
        if hashlib.sha256(data).hexdigest() != digest:
            raise SchemaError(f"damaged: its digest is not {digest}")
        fields = _LAYOUT(parse(data), "")
        for chunk in fields["chunks"]:
            _require_sound(chunk, fields["world_size"])
        return cls(fields["chunks"], fields["world_size"])

    def require_same(self, found: Sequence[Described], rank: int) -> None:
        """Refuse a state that is not what a rank held when it was mirrored.

        Args:
            found: what this process has built.
            rank: this rank.

        Raises:
            LayoutMismatchError: names the tensors.
        """
        if different := differences(self.held_by(rank), held_by_name(found)):
            raise LayoutMismatchError(
                f"rank {rank}: the script built another model or optimizer than the one that was mirrored: "
                f"{'; '.join(different)}. Start the script unchanged, or begin anew: another run id (and durable_dir)"
            )


def pieces_for(layout: Layout, shard: int, rank: int) -> tuple[Chunk, ...]:
    """The pieces of a shard that a rank has a use for: those that its tensors hold."""
    return tuple(chunk for chunk in layout.of(shard) if chunk.is_held_by(rank))


def slot_views(layout: Layout, shard: int, bulk: torch.Tensor, *, rank: int | None = None) -> list[torch.Tensor]:
    """The pieces of a shard in a slot's bulk, typed and shaped.

    Args:
        layout: how the shard is cut.
        shard: index of the shard.
        bulk: uint8 of shape [bulk_bytes].
        rank: leave out what this rank has no use for; None for all pieces.
    """
    chunks = layout.of(shard) if rank is None else pieces_for(layout, shard, rank)
    return [bulk[c.at : c.at + c.nbytes].view(dtype_of(c.dtype)).view(c.sizes) for c in chunks]


def live_views(layout: Layout, shard: int, rank: int, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The pieces of a shard that a rank has a use for, in its live tensors, in the order of `slot_views`.

    Args:
        layout: how the shard is cut.
        shard: index of the shard.
        rank: whose tensors they are.
        tensors: by name; of a sharded tensor the part that is here.
    """
    held = layout.held_by(rank)
    views = []
    for chunk in pieces_for(layout, shard, rank):
        name = local_name(chunk, rank)
        views.append(part_of(tensors[name], chunk, held[name].box.offsets))
    return views


def part_of(tensor: torch.Tensor, chunk: Chunk, corner: tuple[int, ...]) -> torch.Tensor:
    """A piece in a tensor.

    Args:
        tensor: a box of the whole tensor.
        chunk: the piece, which lies in that box.
        corner: of the box.
    """
    view = tensor.detach()
    for dim, (offset, at, size) in enumerate(zip(chunk.offsets, corner, chunk.sizes, strict=True)):
        view = view.narrow(dim, offset - at, size)
    return view


def local_name(chunk: Chunk, rank: int) -> str:
    """Name of a piece's tensor among the tensors of a rank."""
    return chunk.name.removeprefix(private_name(rank, ""))


def aligned(offset: int) -> int:
    """The next place in a bulk where a piece may begin."""
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def box_item(
    cls: type[WriteItem],
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> WriteItem:
    """A box of a tensor as torch.distributed.checkpoint's planner knows it.

    Args:
        cls: the item's class.
        name: name of the tensor in the plan.
        dtype: such as `torch.float32`.
        shape: sizes of the whole tensor.
        offsets: corner of the box.
        sizes: sizes of the box.
    """
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
        properties=TensorProperties(dtype=dtype_of(dtype)),
        size=torch.Size(shape),
    )
    kind = WriteItemType.TENSOR if sizes == shape else WriteItemType.SHARD
    return cls(index=MetadataIndex(name, torch.Size(offsets)), type=kind, tensor_data=data)


def write_item(chunk: Chunk) -> WriteItem:
    """A piece as torch.distributed.checkpoint plans to write it."""
    return box_item(WriteItem, chunk.name, chunk.dtype, chunk.shape, chunk.offsets, chunk.sizes)


def item_bytes(item: WriteItem) -> int:
    """Bytes of the box that an item writes."""
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _fields(chunk: Chunk) -> dict[str, Any]:
    """What is written down of a piece; what most do not have is left out."""
    return {name: value for name, value in vars(chunk).items() if name != "still" or value}


def _still(value: Any, place: str) -> bool:
    return value is not None and boolean(value, place)


_SIZES = sequence(BYTES, most=64)
_LAYOUT = record(
    format=integer(FORMAT, FORMAT),
    world_size=WORLD_SIZE,
    chunks=sequence(record(
        Chunk,
        name=text(), dtype=text(r"torch\.\w+"), shape=_SIZES, offsets=_SIZES, sizes=_SIZES, shard=RANK, at=BYTES,
        nbytes=BYTES, holders=sequence(RANK, most=MOST_RANKS), still=_still,
    )),
)  # fmt: skip


def _require_sound(chunk: Chunk, world_size: int) -> None:
    """Refuse a piece that cannot lie where it says.

    Raises:
        SchemaError: its numbers do not fit each other.
    """
    try:
        length = math.prod(chunk.sizes) * dtype_of(chunk.dtype).itemsize
    except ValueError as error:
        raise SchemaError(f"{chunk.name}: {error}") from error
    is_inside = len(chunk.shape) == len(chunk.offsets) == len(chunk.sizes) and all(
        end <= size for end, size in zip(_end(chunk), chunk.shape, strict=True)
    )
    is_known = chunk.shard < world_size and all(rank < world_size for rank in chunk.holders)
    if not is_inside or not is_known or chunk.nbytes != length or chunk.at % ALIGNMENT_BYTES:
        raise SchemaError(f"{chunk.name}: a piece that cannot lie in its tensor, or in shard {chunk.shard}")


def _held(chunks: Sequence[Chunk], rank: int) -> dict[str, Held]:
    """The boxes that a rank's pieces make up: they were cut from one box each."""
    mine: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        if chunk.is_held_by(rank):
            mine.setdefault(local_name(chunk, rank), []).append(chunk)
    return {name: Held(pieces[0].dtype, pieces[0].shape, _hull(pieces)) for name, pieces in mine.items()}


def _hull(pieces: Sequence[Chunk]) -> Box:
    lows = tuple(map(min, zip(*(c.offsets for c in pieces), strict=True)))
    highs = tuple(map(max, zip(*(_end(c) for c in pieces), strict=True)))
    return Box(lows, tuple(high - low for low, high in zip(lows, highs, strict=True)))


def _end(chunk: Chunk) -> Iterator[int]:
    return (offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
