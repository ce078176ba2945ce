"""Divide the state of all ranks into one shard per rank, of about equal size.

Large boxes that several ranks have are cut first, along their outermost dimension: each piece is then contiguous in
memory, and copying it is one memcpy. Then each piece goes to the rank with the fewest bytes so far, of those that have
it, the largest first. torch.distributed.checkpoint's planner does the same, but wants all pieces from every rank: for
256 ranks that took a minute. The planner runs once; its layout is used at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heapreplace
from itertools import pairwise
from typing import NamedTuple

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.replica.layout.layout import (
    Chunk,
    Layout,
    aligned,
    dtype_of,
    private_name,
)
from lightning_ckptless.replica.layout.tensor_spec import Box, Described, is_empty_part

PIECES_PER_RANK = 16
PIECE_BYTES_LEAST = 16 * 1024
"""Below this size a better balance saves less time than the additional copies cost."""

Corner = tuple[str, tuple[int, ...]]
"""Name of a tensor in the plan, and the start of a box in it."""


Group = tuple[Sequence[Described], list[int]]
"""A description, and the ranks that have given it."""


def plan_layout(per_rank: Sequence[Sequence[Described]]) -> Layout:
    """Divide the state of all ranks into one shard per rank, of about equal size.

    Args:
        per_rank: description of each rank's state. Replicated tensors have equal descriptions on all ranks. With many
            ranks it should be the same object for ranks that describe their state alike, which is then read once.

    Returns:
        The layout, which is the same on all ranks for the same descriptions.

    Raises:
        LayoutMismatchError: ranks describe a tensor differently.
    """
    groups = _grouped(per_rank)
    _require_alike(groups)
    world_size, named = len(per_rank), _named_for_all(groups)
    holders = _holders(named)
    boxes = {_corner(d): d for described, _ in reversed(named) for d in described}
    _require_covered(boxes)
    static = _static_names([described for described, _ in named])
    # Divided separately, so that both the static part and the part that every step writes are balanced.
    first, rest = (
        _divide([(d, holders[c]) for c, d in boxes.items() if (d.name in static) is part], world_size)
        for part in (True, False)
    )
    chunks = [
        chunk
        for shard, pieces in enumerate(zip(first, rest, strict=True))
        for chunk in _place(pieces, shard, world_size)
    ]
    return Layout(chunks, world_size)


def _static_names(described: Sequence[Sequence[Described]]) -> frozenset[str]:
    """Names of the tensors that all ranks with a part of them describe as static."""
    all_of_them = [d for of_rank in described for d in of_rank]
    return frozenset(d.name for d in all_of_them if d.static) - {d.name for d in all_of_them if not d.static}


class _Piece(NamedTuple):
    """A part of a box.

    Args:
        described: the box.
        part: the part.
        holders: ranks that have it.
    """

    described: Described
    part: Box
    holders: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.described.name

    @property
    def nbytes(self) -> int:
        return _box_bytes(self.described, self.part)


def _divide(boxes: Sequence[tuple[Described, tuple[int, ...]]], world_size: int) -> list[list[_Piece]]:
    """Divide boxes among the ranks that have them; returns the pieces of each rank."""
    shared = [(d, ranks) for d, ranks in boxes if len(ranks) > 1 or world_size == 1]
    piece_bytes = max(sum(_bytes(d) for d, _ in shared) // (PIECES_PER_RANK * world_size), PIECE_BYTES_LEAST)
    pieces = [_Piece(d, part, ranks) for d, ranks in shared for part in _cut(d.held.box, _item_bytes(d), piece_bytes)]
    divided: list[list[_Piece]] = [[] for _ in range(world_size)]
    for described, ranks in boxes:
        if len(ranks) == 1 < world_size:
            # Without a weight for the others: ranks own about the same number of bytes.
            divided[ranks[0]].append(_Piece(described, described.held.box, ranks))
    loads = [0] * world_size
    waiting: dict[int, list[tuple[int, int]]] = {}
    for piece in sorted(pieces, key=lambda piece: -piece.nbytes):
        # Ranks in different groups: a load may have grown since it was put here, and is then put back.
        heap = waiting.get(id(piece.holders)) or [(0, rank) for rank in piece.holders]
        waiting[id(piece.holders)] = heap
        while heap[0][0] != loads[heap[0][1]]:
            heapreplace(heap, (loads[heap[0][1]], heap[0][1]))
        rank = heap[0][1]
        loads[rank] += piece.nbytes
        heapreplace(heap, (loads[rank], rank))
        divided[rank].append(piece)
    return divided


def _require_covered(boxes: Mapping[Corner, Described]) -> None:
    """Check that the boxes of each tensor have as many elements as the tensor.

    Raises:
        LayoutMismatchError: parts of a tensor are missing, or in several different boxes.
    """
    held: dict[str, int] = {}
    for described in boxes.values():
        held[described.name] = held.get(described.name, 0) + math.prod(described.held.box.sizes)
    for described in boxes.values():
        if held[described.name] != (whole := math.prod(described.shape)):
            raise LayoutMismatchError(
                f"{described.name}: the ranks have {held[described.name]} elements of {whole}: its parts must cover "
                "it exactly once"
            )


def _grouped(per_rank: Sequence[Sequence[Described]]) -> list[Group]:
    """The ranks, grouped by the object that describes their state."""
    groups: dict[int, Group] = {}
    for rank, described in enumerate(per_rank):
        groups.setdefault(id(described), (described, []))[1].append(rank)
    return [*groups.values()]


def _require_alike(groups: Sequence[Group]) -> None:
    """Check that replicated tensors have equal descriptions, and that boxes of one tensor agree on dtype and shape."""
    first = {d.name: d for d in groups[0][0] if d.replicated and not d.digest}
    wholes: dict[str, tuple[int, Described]] = {}
    for described, (rank, *_) in groups:
        other = {d.name: d for d in described if d.replicated and not d.digest}
        for name in sorted(first.keys() | other.keys()):
            found, expected = other.get(name), first.get(name)
            if _is_whole(found) and _is_whole(expected) and found != expected:
                raise LayoutMismatchError(_unlike(rank, name, found, 0, expected))
        for d in other.values():
            known_rank, known = wholes.setdefault(d.name, (rank, d))
            if (known.dtype, known.shape, known.box is None) != (d.dtype, d.shape, d.box is None):
                raise LayoutMismatchError(_unlike(rank, d.name, d, known_rank, known))


def _is_whole(described: Described | None) -> bool:
    return described is None or described.box is None


def _unlike(rank: int, name: str, found: Described | None, other_rank: int, expected: Described | None) -> str:
    return (
        f"rank {rank}: {name} is {found and found.held}, but on rank {other_rank} it is {expected and expected.held}: "
        f"build the same model and optimizer on every rank"
    )


def _named_for_all(groups: Sequence[Group]) -> list[Group]:
    """The descriptions with names that are unique over all ranks, without empty parts."""
    differing = _differing([described for described, _ in groups])
    named: list[Group] = []
    for described, ranks in groups:
        parts = [d for d in described if not is_empty_part(d)]
        private = [d for d in parts if not d.replicated or d.name in differing]
        named.append(([d for d in parts if d.replicated and d.name not in differing], ranks))
        if private:
            named += [([replace(d, name=private_name(rank, d.name)) for d in private], [rank]) for rank in ranks]
    return named


def _differing(descriptions: Sequence[Sequence[Described]]) -> set[str]:
    """Names of the tensors that could have been equal on all ranks but are not."""
    digested = [{d.name: d for d in described if d.digest} for described in descriptions]
    names = set().union(*digested)
    return {name for name in names if any(each.get(name) != digested[0].get(name) for each in digested)}


def _corner(described: Described) -> Corner:
    return described.name, described.held.box.offsets


def _bytes(described: Described) -> int:
    return _box_bytes(described, described.held.box)


def _box_bytes(described: Described, box: Box) -> int:
    return math.prod(box.sizes) * _item_bytes(described)


def _item_bytes(described: Described) -> int:
    return dtype_of(described.dtype).itemsize


def _holders(groups: Sequence[Group]) -> dict[Corner, tuple[int, ...]]:
    """The ranks that have each box, ascending; boxes that the same ranks have share one tuple."""
    holders: dict[Corner, list[int]] = {}
    for described, ranks in groups:
        for d in described:
            holders.setdefault(_corner(d), []).extend(ranks)
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    found = ((corner, tuple(sorted(ranks))) for corner, ranks in holders.items())
    return {corner: shared.setdefault(ranks, ranks) for corner, ranks in found}


def _cut(box: Box, item_bytes_each: int, piece_bytes: int) -> Iterator[Box]:
    """Cut a box along its first dimension of size greater than one until each part is small enough."""
    offsets, sizes = box
    parts = -(-math.prod(sizes) * item_bytes_each // piece_bytes)
    dim = next((d for d, size in enumerate(sizes) if size > 1), None)
    if parts <= 1 or dim is None:
        yield box
        return
    parts = min(parts, sizes[dim])
    edges = [sizes[dim] * part // parts for part in range(parts + 1)]
    for low, high in pairwise(edges):
        corner = (*offsets[:dim], offsets[dim] + low, *offsets[dim + 1 :])
        yield from _cut(Box(corner, (*sizes[:dim], high - low, *sizes[dim + 1 :])), item_bytes_each, piece_bytes)


def _place(parts: tuple[Sequence[_Piece], Sequence[_Piece]], shard: int, world_size: int) -> Iterator[Chunk]:
    """Place the pieces of a shard: first the static ones, then the others."""
    at = 0

    def place_of(piece: _Piece) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
        # Pieces that the same ranks have are contiguous, so that what a rank lacks is sent in few messages.
        return piece.holders, piece.name, piece.part.offsets

    static, changing = (sorted(pieces, key=place_of) for pieces in parts)
    for index, piece in enumerate(static + changing):
        described = piece.described
        yield Chunk(
            name=described.name,
            dtype=described.dtype,
            shape=described.shape,
            offsets=piece.part.offsets,
            sizes=piece.part.sizes,
            shard=shard,
            at=at,
            nbytes=piece.nbytes,
            holders=piece.holders if len(piece.holders) < world_size else (),
            static=index < len(static),
        )
        at = aligned(at + piece.nbytes)
