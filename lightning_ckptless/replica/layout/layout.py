"""The layout of the state in shards: where each piece of each tensor is stored, and which ranks need it.

Replicated tensors are divided over all ranks. Each piece of a sharded tensor is in the shard of a rank that has it. A
private tensor of one rank is in that rank's shard, with the name `rank<r>/<name>`. A layout converts to the metadata of
torch.distributed.checkpoint, and is serialized to the same bytes on all ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.formats.schema import (
    BYTES,
    MOST_RANKS,
    RANK,
    SchemaError,
    boolean,
    integer,
    record,
    sequence,
    text,
)
from lightning_ckptless.formats.sealed import parse
from lightning_ckptless.replica.layout.tensor_spec import SIZES, Box, Described, Held, differences, held_by_name
from lightning_ckptless.replica.slot_stamp import WORLD_SIZE

FORMAT = 2
ALIGNMENT_BYTES = 64
_PRIVATE = "rank"
_NO_RANK = -1


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and its place in a shard.

    Args:
        name: name of the tensor in the plan.
        dtype: e.g. `torch.float32`.
        shape: shape of the whole tensor.
        offsets: start of the box in each dimension.
        sizes: size of the box in each dimension.
        shard: shard that contains the box.
        at: byte offset in the shard's bulk, a multiple of 64.
        nbytes: length in bytes.
        holders: ranks whose tensors contain the box; empty for all.
        static: whether the tensor is expected to be static. Such pieces come first in the bulk.
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
    static: bool = False

    def is_held_by(self, rank: int) -> bool:
        """Whether a rank's tensors contain the box."""
        return not self.holders or rank in self.holders


@cache
def dtype_of(name: str) -> torch.dtype:
    """The dtype with a name such as `torch.float32`.

    Raises:
        ValueError: torch has no dtype of that name.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype of this torch version")
    return dtype


def private_name(rank: int, name: str) -> str:
    """The name in the plan of a private tensor of one rank."""
    return f"{_PRIVATE}{rank}/{name}"


class Layout:
    """The place of each piece of the state in the shards.

    Args:
        chunks: the pieces, ordered by shard and offset.
        world_size: number of shards.

    Attributes:
        digest: sha256 of the layout, equal on all ranks and across relaunches of the same script.
    """

    def __init__(self, chunks: Sequence[Chunk], world_size: int) -> None:
        self.chunks = tuple(chunks)
        self.world_size = world_size
        self._by_shard = _by_shard(self.chunks, world_size)
        self._held: dict[int, dict[str, Held]] = {}
        # `vars` instead of `dataclasses.asdict`, which took a tenth of a second of a relaunch.
        fields = {
            "format": FORMAT,
            "world_size": world_size,
            "chunks": [_fields(chunk) for chunk in self.chunks],
        }
        self._bytes = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        self.digest = hashlib.sha256(self._bytes).hexdigest()

    def of(self, shard: int) -> tuple[Chunk, ...]:
        """The pieces of a shard, ordered by offset."""
        return self._by_shard[shard]

    def bulk_bytes(self, shard: int) -> int:
        """Length of a shard's tensor state."""
        return max((aligned(chunk.at + chunk.nbytes) for chunk in self.of(shard)), default=0)

    def static_bytes(self, shard: int) -> int:
        """Length of the static part, at the beginning of a shard's tensor state."""
        return max((aligned(chunk.at + chunk.nbytes) for chunk in self.of(shard) if chunk.static), default=0)

    def held_by(self, rank: int) -> Mapping[str, Held]:
        """The part of each tensor that a rank has, by local name. Tensors of which it has no part are omitted."""
        if rank not in self._held:
            own = _held([chunk for chunk in self.chunks if not _is_common(chunk)], rank)
            self._held[rank] = {**self._held_by_all, **own} if own else self._held_by_all
        return self._held[rank]

    @cached_property
    def _held_by_all(self) -> dict[str, Held]:
        return _held([chunk for chunk in self.chunks if _is_common(chunk)], _NO_RANK)

    def prepare(self) -> None:
        """Compute what all ranks have in common, so that `held_by` and `need` take no time later."""
        self.held_by(_NO_RANK)
        self.need  # noqa: B018 - computed once

    def known_to(self, rank: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and whole shape of every tensor, by its name on a rank, without private tensors of other ranks."""
        return {
            local_name(chunk, rank): (dtype_of(chunk.dtype), chunk.shape)
            for chunk in self.chunks
            if _owner_of(chunk.name) in (None, rank)
        }

    @cached_property
    def need(self) -> dict[int, tuple[int, ...]]:
        """For each rank, the shards that together contain all of its tensors."""
        common = tuple(sorted({chunk.shard for chunk in self.chunks if not chunk.holders}))
        held: dict[int, set[int]] = {}
        for chunk in self.chunks:
            for rank in chunk.holders:
                held.setdefault(rank, set()).add(chunk.shard)
        # Ranks that need the common shards only share one tuple: every rank may need every shard.
        every, ranks = frozenset(common), range(self.world_size)
        extra = {rank: shards for rank, shards in held.items() if not shards <= every}
        return {rank: tuple(sorted(every | extra[rank])) if rank in extra else common for rank in ranks}

    @cached_property
    def metadata(self) -> Metadata:
        """The layout as metadata of torch.distributed.checkpoint."""
        plans = [SavePlan([write_item(c) for c in self.of(shard)]) for shard in range(self.world_size)]
        return DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)[1]

    def to_bytes(self) -> bytes:
        """The layout as JSON. Equal layouts have equal bytes."""
        return self._bytes

    @classmethod
    def from_bytes(cls, data: bytes, digest: str) -> Layout:
        """Parse the result of `to_bytes`.

        Args:
            data: the bytes.
            digest: expected digest of the layout.

        Raises:
            SchemaError: the bytes are damaged or not a layout.
        """
        if hashlib.sha256(data).hexdigest() != digest:
            raise SchemaError(f"damaged: its digest is not {digest}")
        fields = _LAYOUT(parse(data), "")
        for chunk in fields["chunks"]:
            _require_sound(chunk, fields["world_size"])
        return cls(fields["chunks"], fields["world_size"])

    def require_same(self, found: Sequence[Described], rank: int) -> None:
        """Check that the state of this process matches the mirrored state of its rank.

        Args:
            found: description of the state of this process.
            rank: this rank.

        Raises:
            LayoutMismatchError: they differ; the message names the tensors.
        """
        if different := differences(self.held_by(rank), held_by_name(found)):
            raise LayoutMismatchError(
                f"rank {rank}: the model or optimizer of the script differs from the mirrored one: "
                f"{'; '.join(different)}. Start the script unchanged, or start from scratch with another run id (and "
                "durable_dir)"
            )


def _by_shard(chunks: Iterable[Chunk], world_size: int) -> tuple[tuple[Chunk, ...], ...]:
    found: list[list[Chunk]] = [[] for _ in range(world_size)]
    for chunk in chunks:
        found[chunk.shard].append(chunk)
    return tuple(map(tuple, found))


def _owner_of(name: str) -> int | None:
    """The rank of a private tensor; None for any other tensor."""
    prefix, _, _ = name.partition("/")
    number = prefix.removeprefix(_PRIVATE)
    return int(number) if number != prefix and number.isdecimal() else None


def _is_common(chunk: Chunk) -> bool:
    """Whether all ranks have the piece under the same name; the private tensors of a single rank have its prefix."""
    return not chunk.holders and _owner_of(chunk.name) is None


def pieces_for(layout: Layout, shard: int, rank: int) -> tuple[Chunk, ...]:
    """The pieces of a shard that a rank's tensors contain."""
    return tuple(chunk for chunk in layout.of(shard) if chunk.is_held_by(rank))


def spans_lacked(layout: Layout, shard: int, rank: int) -> tuple[slice, ...]:
    """The parts of a shard's bulk that a rank's tensors do not contain, in ascending order.

    None of them extends beyond the end of the static part.

    Args:
        layout: layout of the shard.
        shard: index of the shard.
        rank: the rank.
    """
    spans = []
    for (is_held, _), run in groupby(layout.of(shard), key=lambda chunk: (chunk.is_held_by(rank), chunk.static)):
        chunks = list(run)
        if not is_held:
            spans.append(slice(chunks[0].at, chunks[-1].at + chunks[-1].nbytes))
    return tuple(spans)


def slot_views(layout: Layout, shard: int, bulk: torch.Tensor, *, rank: int | None = None) -> list[torch.Tensor]:
    """The pieces of a shard in a slot's bulk, typed and shaped.

    Args:
        layout: layout of the shard.
        shard: index of the shard.
        bulk: uint8 of shape [bulk_bytes].
        rank: include only pieces that this rank's tensors contain; None for all pieces.
    """
    chunks = layout.of(shard) if rank is None else pieces_for(layout, shard, rank)
    return [slot_view(chunk, bulk) for chunk in chunks]


def slot_view(chunk: Chunk, bulk: torch.Tensor) -> torch.Tensor:
    """A piece of a shard in a slot's bulk, typed and shaped."""
    return bulk[chunk.at : chunk.at + chunk.nbytes].view(dtype_of(chunk.dtype)).view(chunk.sizes)


def live_views(layout: Layout, shard: int, rank: int, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The pieces of a shard as views of a rank's live tensors, in the order of `slot_views`.

    Args:
        layout: layout of the shard.
        shard: index of the shard.
        rank: rank of the tensors.
        tensors: live tensors by name; of a sharded tensor, the local part.
    """
    held = layout.held_by(rank)
    views = []
    for chunk in pieces_for(layout, shard, rank):
        name = local_name(chunk, rank)
        views.append(part_of(tensors[name], chunk, held[name].box.offsets))
    return views


def part_of(tensor: torch.Tensor, chunk: Chunk, corner: tuple[int, ...]) -> torch.Tensor:
    """A piece as a view of a tensor.

    Args:
        tensor: a box of the whole tensor.
        chunk: the piece, which is inside that box.
        corner: start of the box in each dimension.
    """
    view = tensor.detach()
    for dim, (offset, at, size) in enumerate(zip(chunk.offsets, corner, chunk.sizes, strict=True)):
        if size != view.shape[dim]:
            view = view.narrow(dim, offset - at, size)
    return view


def local_name(chunk: Chunk, rank: int) -> str:
    """The name of a piece's tensor among the tensors of a rank."""
    return chunk.name.removeprefix(private_name(rank, ""))


def aligned(offset: int) -> int:
    """The next offset in a bulk at which a piece may start."""
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def box_item(
    cls: type[WriteItem],
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> WriteItem:
    """A box of a tensor as a write item of torch.distributed.checkpoint's planner.

    Args:
        cls: class of the item.
        name: name of the tensor in the plan.
        dtype: e.g. `torch.float32`.
        shape: shape of the whole tensor.
        offsets: start of the box in each dimension.
        sizes: size of the box in each dimension.
    """
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
        properties=TensorProperties(dtype=dtype_of(dtype)),
        size=torch.Size(shape),
    )
    kind = WriteItemType.TENSOR if sizes == shape else WriteItemType.SHARD
    return cls(index=MetadataIndex(name, torch.Size(offsets)), type=kind, tensor_data=data)


def write_item(chunk: Chunk) -> WriteItem:
    """A piece as a write item of torch.distributed.checkpoint's planner."""
    return box_item(WriteItem, chunk.name, chunk.dtype, chunk.shape, chunk.offsets, chunk.sizes)


def _fields(chunk: Chunk) -> dict[str, Any]:
    """The serialized fields of a piece. `still` is omitted where it is False."""
    return {name: value for name, value in vars(chunk).items() if name != "static" or value}


def _is_static(value: Any, path: str) -> bool:
    return value is not None and boolean(value, path)


_LAYOUT = record(
    format=integer(FORMAT, FORMAT),
    world_size=WORLD_SIZE,
    chunks=sequence(record(
        Chunk,
        name=text(), dtype=text(r"torch\.\w+"), shape=SIZES, offsets=SIZES, sizes=SIZES, shard=RANK, at=BYTES,
        nbytes=BYTES, holders=sequence(RANK, most=MOST_RANKS), static=_is_static,
    )),
)  # fmt: skip


def _require_sound(chunk: Chunk, world_size: int) -> None:
    """Check that the fields of a piece are consistent.

    Raises:
        SchemaError: they are not.
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
        raise SchemaError(f"{chunk.name}: a piece is inconsistent with its tensor or with shard {chunk.shard}")


def _held(chunks: Sequence[Chunk], rank: int) -> dict[str, Held]:
    """The part of each tensor that a rank's pieces form. The pieces of a tensor were cut from one box."""
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
