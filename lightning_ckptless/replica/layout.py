"""How the state is cut into shards: torch.distributed.checkpoint's plan, made once and used at every step.

What all ranks hold alike is divided over them; what a rank holds alone is a part of its own shard, under the name
`rank<r>/<name>`. The planner removes the duplicates, balances the bytes and yields the metadata that any DCP reader
understands. It balances by whole pieces, so large tensors are cut first, along their outermost dimension: each piece is
one run of memory, and a copy of it one memcpy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from lightning_ckptless.errors import LayoutMismatchError, OptionsError

ALIGNMENT_BYTES = 64
PIECES_PER_RANK = 16
PIECE_BYTES_LEAST = 16 * 1024
"""Below this a better balance saves less than the additional copies cost."""


@dataclass(frozen=True)
class Described:
    """One tensor of the state, without its values.

    Args:
        name: fully qualified name.
        dtype: such as `torch.float32`.
        shape: its sizes.
        replicated: whether all ranks hold the same values.
        kind: `tensor`; room for others.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    replicated: bool
    kind: str = "tensor"


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
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shard: int
    at: int
    nbytes: int


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
        # `vars` where `dataclasses.asdict` would do as well: in a relaunch that took a tenth of a second.
        fields = {"world_size": world_size, "chunks": [vars(chunk) for chunk in self.chunks]}
        self._bytes = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        self.digest = hashlib.sha256(self._bytes).hexdigest()

    def of(self, shard: int) -> tuple[Chunk, ...]:
        """The pieces of a shard, in the order of their places."""
        return self._by_shard[shard]

    def bulk_bytes(self, shard: int) -> int:
        """Length of a shard's tensor part."""
        return max((_aligned(chunk.at + chunk.nbytes) for chunk in self.of(shard)), default=0)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every tensor, by its name in the plan."""
        return {chunk.name: (chunk.dtype, chunk.shape) for chunk in self.chunks}

    @cached_property
    def metadata(self) -> Metadata:
        """The layout as torch.distributed.checkpoint describes a checkpoint."""
        plans = [SavePlan([write_item(c) for c in self.of(shard)]) for shard in range(self.world_size)]
        return DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)[1]

    def to_bytes(self) -> bytes:
        """The layout as JSON, the same bytes for the same layout."""
        return self._bytes

    @classmethod
    def from_bytes(cls, data: bytes) -> Layout:
        """The layout that `to_bytes` wrote.

        Raises:
            ValueError, KeyError, TypeError: the bytes are something else.
        """
        fields = json.loads(data)
        return cls([_chunk(chunk) for chunk in fields["chunks"]], fields["world_size"])

    def require_same(self, found: Layout, rank: int) -> None:
        """Refuse a state that is cut otherwise than this layout.

        Args:
            found: layout of what this process built.
            rank: this rank; private tensors of others are not compared.

        Raises:
            LayoutMismatchError: names the tensors.
        """
        if different := differences(_seen_by(self, rank), _seen_by(found, rank)):
            raise LayoutMismatchError(
                f"rank {rank}: the script built another model or optimizer than the one that was mirrored: "
                f"{'; '.join(different)}. Start the script unchanged, or begin anew: another run id (and durable_dir)"
            )


def describe(tensors: Mapping[str, torch.Tensor], *, replicated: bool) -> tuple[Described, ...]:
    """What a set of tensors is like.

    Args:
        tensors: by fully qualified name.
        replicated: whether all ranks hold the same values.

    Raises:
        OptionsError: a tensor is not dense.
    """
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise OptionsError(f"{name}: a tensor of layout {tensor.layout} cannot be mirrored, expected torch.strided")
    return tuple(Described(name, str(t.dtype), tuple(t.shape), replicated) for name, t in tensors.items())


def plan_layout(per_rank: Sequence[Sequence[Described]]) -> Layout:
    """Cut the state of all ranks into one shard per rank, of about equal bytes.

    Args:
        per_rank: what each rank holds. Replicated tensors are described alike on all ranks.

    Returns:
        The layout. All ranks compute the same from the same descriptions.

    Raises:
        LayoutMismatchError: ranks describe a replicated tensor differently.
    """
    world_size = len(per_rank)
    _require_alike(per_rank)
    replicated = [d for d in per_rank[0] if d.replicated]
    total_bytes = sum(_bytes_of(d.dtype, d.shape) for d in replicated)
    piece_bytes = max(total_bytes // (PIECES_PER_RANK * world_size), PIECE_BYTES_LEAST)
    pieces = [piece for d in replicated for piece in _pieces(d, piece_bytes)]
    # The planner gives each piece to the rank that has least so far: the largest must come first.
    pieces.sort(key=lambda item: -_box_bytes(item))
    plans = []
    for rank, described in enumerate(per_rank):
        private = [_private_piece(d, rank) for d in described if not d.replicated]
        plans.append(SavePlan([*private, *pieces]))
    global_plan, _ = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)
    return Layout([chunk for shard, plan in enumerate(global_plan) for chunk in _place(plan, shard)], world_size)


def differences(expected: Layout, found: Layout, limit: int = 5) -> list[str]:
    """Sentences that name the tensors in which two layouts differ.

    Args:
        expected: layout of the mirrored state.
        found: layout of the state at hand.
        limit: number of tensors to name; the rest is counted.
    """
    before, after = expected.tensors(), found.tensors()
    sentences = []
    if expected.world_size != found.world_size:
        sentences.append(f"expected {expected.world_size} ranks, found {found.world_size}")
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            sentences.append(f"{name} is missing, expected {_words(*before[name])}")
        elif name not in before:
            sentences.append(f"{name} is new, {_words(*after[name])}")
        elif before[name] != after[name]:
            sentences.append(f"{name} is {_words(*after[name])}, expected {_words(*before[name])}")
    if len(sentences) > limit:
        sentences[limit:] = [f"and {len(sentences) - limit} more"]
    return sentences


def pieces_for(layout: Layout, shard: int, rank: int) -> tuple[Chunk, ...]:
    """The pieces of a shard that a rank has a use for: all but other ranks' private ones."""
    if shard == rank:
        return layout.of(shard)
    return tuple(chunk for chunk in layout.of(shard) if not chunk.name.startswith(private_name(shard, "")))


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
        tensors: by name.
    """
    return [_box(tensors[local_name(chunk, rank)], chunk) for chunk in pieces_for(layout, shard, rank)]


def _chunk(fields: dict[str, Any]) -> Chunk:
    return Chunk(**fields | {key: tuple(fields[key]) for key in ("shape", "offsets", "sizes")})


def local_name(chunk: Chunk, rank: int) -> str:
    """Name of a piece's tensor among the tensors of a rank."""
    return chunk.name.removeprefix(private_name(rank, ""))


def _box(tensor: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    view = tensor.detach()
    for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        view = view.narrow(dim, offset, size)
    return view


# ------------------------------------------------------------------ planning


class _Piece(WriteItem):
    """A write item that weighs what it writes: torch's own weighs the whole tensor, for each of its pieces."""

    def tensor_storage_size(self) -> int | None:
        return _box_bytes(self)


class _PrivatePiece(WriteItem):
    """A write item that no other rank could take.

    It has no weight: ranks hold about the same private bytes, and the planner meets those of one rank before it divides
    what is common, those of the others after it.
    """

    def tensor_storage_size(self) -> int | None:
        return None


def _require_alike(per_rank: Sequence[Sequence[Described]]) -> None:
    first = {d.name: d for d in per_rank[0] if d.replicated}
    for rank, described in enumerate(per_rank):
        other = {d.name: d for d in described if d.replicated}
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise LayoutMismatchError(
                    f"rank {rank}: {name} is {other.get(name)}, on rank 0 it is {first.get(name)}: "
                    f"build the same model and optimizer on every rank"
                )


def _pieces(described: Described, piece_bytes: int) -> Iterator[WriteItem]:
    shape = described.shape
    for offsets, sizes in _boxes((0,) * len(shape), shape, dtype_of(described.dtype).itemsize, piece_bytes):
        kind = WriteItemType.TENSOR if sizes == shape else WriteItemType.SHARD
        yield _item(_Piece, kind, described.name, described.dtype, shape, offsets, sizes)


def _boxes(
    offsets: tuple[int, ...], sizes: tuple[int, ...], item_bytes: int, piece_bytes: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a box along its first dimension of more than one until each part is small enough."""
    parts = -(-math.prod(sizes) * item_bytes // piece_bytes)
    dim = next((d for d, size in enumerate(sizes) if size > 1), None)
    if parts <= 1 or dim is None:
        yield offsets, sizes
        return
    parts = min(parts, sizes[dim])
    edges = [sizes[dim] * part // parts for part in range(parts + 1)]
    for low, high in pairwise(edges):
        corner = (*offsets[:dim], offsets[dim] + low, *offsets[dim + 1 :])
        yield from _boxes(corner, (*sizes[:dim], high - low, *sizes[dim + 1 :]), item_bytes, piece_bytes)


def _private_piece(described: Described, rank: int) -> WriteItem:
    shape, name = described.shape, private_name(rank, described.name)
    return _item(_PrivatePiece, WriteItemType.TENSOR, name, described.dtype, shape, (0,) * len(shape), shape)


def _item(
    cls: type[WriteItem],
    kind: WriteItemType,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> WriteItem:
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
        properties=TensorProperties(dtype=dtype_of(dtype)),
        size=torch.Size(shape),
    )
    return cls(index=MetadataIndex(name, torch.Size(offsets)), type=kind, tensor_data=data)


def write_item(chunk: Chunk) -> WriteItem:
    """A piece as torch.distributed.checkpoint plans to write it."""
    kind = WriteItemType.TENSOR if chunk.sizes == chunk.shape else WriteItemType.SHARD
    return _item(WriteItem, kind, chunk.name, chunk.dtype, chunk.shape, chunk.offsets, chunk.sizes)


def _place(plan: SavePlan, shard: int) -> Iterator[Chunk]:
    at = 0
    for item in sorted(plan.items, key=lambda item: (item.index.fqn, tuple(item.index.offset or ()))):
        data = item.tensor_data
        assert data is not None
        yield Chunk(
            name=item.index.fqn,
            dtype=str(data.properties.dtype),
            shape=tuple(data.size),
            offsets=tuple(data.chunk.offsets),
            sizes=tuple(data.chunk.sizes),
            shard=shard,
            at=at,
            nbytes=_box_bytes(item),
        )
        at = _aligned(at + _box_bytes(item))


def _seen_by(layout: Layout, rank: int) -> Layout:
    others = tuple(private_name(other, "") for other in range(layout.world_size) if other != rank)
    return Layout([chunk for chunk in layout.chunks if not chunk.name.startswith(others)], layout.world_size)


def _box_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype_of(dtype).itemsize


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _words(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype.removeprefix('torch.')}{list(shape)}"
