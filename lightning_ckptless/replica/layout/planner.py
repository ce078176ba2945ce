"""Divide the state of all ranks into one shard per rank with torch.distributed.checkpoint's planner.

The planner removes duplicates, balances the bytes and checks that each tensor is covered exactly once. It balances
whole pieces, so large boxes that several ranks have are cut first, along their outermost dimension: each piece is then
contiguous in memory, and copying it is one memcpy. The planner runs once; its layout is used at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.replica.layout.layout import (
    Chunk,
    Layout,
    aligned,
    box_item,
    dtype_of,
    item_bytes,
    private_name,
)
from lightning_ckptless.replica.layout.tensor_spec import Box, Described, is_empty_part

PIECES_PER_RANK = 16
PIECE_BYTES_LEAST = 16 * 1024
"""Below this size a better balance saves less time than the additional copies cost."""

Corner = tuple[str, tuple[int, ...]]
"""Name of a tensor in the plan, and the start of a box in it."""


def plan_layout(per_rank: Sequence[Sequence[Described]]) -> Layout:
    """Divide the state of all ranks into one shard per rank, of about equal size.

    Args:
        per_rank: description of each rank's state. Replicated tensors have equal descriptions on all ranks.

    Returns:
        The layout, which is the same on all ranks for the same descriptions.

    Raises:
        LayoutMismatchError: ranks describe a tensor differently.
    """
    _require_alike(per_rank)
    world_size, described = len(per_rank), _named_for_all(per_rank)
    holders = _holders(described)
    shared = {corner for corner, ranks in holders.items() if len(ranks) > 1 or world_size == 1}
    static, pieces = _static_names(described), PIECES_PER_RANK * world_size
    sizes = {_corner(d): _bytes(d) for of_rank in described for d in of_rank if _corner(d) in shared}
    piece_bytes = {
        part: max(sum(sizes[c] for c in sizes if (c[0] in static) is part) // pieces, PIECE_BYTES_LEAST)
        for part in (False, True)
    }
    items: list[list[WriteItem]] = []
    held_by: dict[Corner, tuple[int, ...]] = {}
    for of_rank in described:
        items.append([])
        for d in of_rank:
            small_enough = piece_bytes[d.name in static]
            cut = list(_pieces(d, small_enough)) if _corner(d) in shared else [_item(_Owned, d, d.held.box)]
            held_by |= {(d.name, tuple(item.index.offset or ())): holders[_corner(d)] for item in cut}
            items[-1] += cut
    # Divided separately, so that both the static part and the part that every step writes are balanced.
    first = _divide([[item for item in of_rank if item.index.fqn in static] for of_rank in items])
    rest = _divide([[item for item in of_rank if item.index.fqn not in static] for of_rank in items])
    chunks = [
        chunk
        for shard, (early, late) in enumerate(zip(first, rest, strict=True))
        for chunk in _place((early, late), shard, held_by, world_size)
    ]
    return Layout(chunks, world_size)


def _static_names(described: Sequence[Sequence[Described]]) -> frozenset[str]:
    """Names of the tensors that all ranks with a part of them describe as static."""
    all_of_them = [d for of_rank in described for d in of_rank]
    return frozenset(d.name for d in all_of_them if d.static) - {d.name for d in all_of_them if not d.static}


def _divide(items: Sequence[Sequence[WriteItem]]) -> list[SavePlan]:
    # The planner assigns each piece to the rank with the fewest bytes so far, so the largest must come first.
    plans = [SavePlan(sorted(of_rank, key=lambda item: -item_bytes(item))) for of_rank in items]
    return DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)[0]


class _Shared(WriteItem):
    """A write item whose weight is its own size; torch's items have the weight of the whole tensor."""

    def tensor_storage_size(self) -> int | None:
        return item_bytes(self)


class _Owned(WriteItem):
    """A write item that only one rank can write.

    It has no weight, because ranks own about the same number of bytes, and the planner sees the owned items of one rank
    before the shared ones but those of other ranks after them.
    """

    def tensor_storage_size(self) -> int | None:
        return None


def _require_alike(per_rank: Sequence[Sequence[Described]]) -> None:
    """Check that replicated tensors have equal descriptions, and that boxes of one tensor agree on dtype and shape."""
    first = {d.name: d for d in per_rank[0] if d.replicated and not d.digest}
    wholes: dict[str, tuple[int, Described]] = {}
    for rank, described in enumerate(per_rank):
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


def _named_for_all(per_rank: Sequence[Sequence[Described]]) -> list[list[Described]]:
    """The descriptions with names that are unique over all ranks, without empty parts."""
    differing = _differing(per_rank)
    return [
        [
            d if d.replicated and d.name not in differing else replace(d, name=private_name(rank, d.name))
            for d in described
            if not is_empty_part(d)
        ]
        for rank, described in enumerate(per_rank)
    ]


def _differing(per_rank: Sequence[Sequence[Described]]) -> set[str]:
    """Names of the tensors that could have been equal on all ranks but are not."""
    digested = [{d.name: d for d in described if d.digest} for described in per_rank]
    names = set().union(*digested)
    return {name for name in names if any(of_rank.get(name) != digested[0].get(name) for of_rank in digested)}


def _corner(described: Described) -> Corner:
    return described.name, described.held.box.offsets


def _bytes(described: Described) -> int:
    return math.prod(described.held.box.sizes) * dtype_of(described.dtype).itemsize


def _holders(described: Sequence[Sequence[Described]]) -> dict[Corner, tuple[int, ...]]:
    """The ranks that have each box."""
    holders: dict[Corner, list[int]] = {}
    for rank, of_rank in enumerate(described):
        for d in of_rank:
            holders.setdefault(_corner(d), []).append(rank)
    return {corner: tuple(ranks) for corner, ranks in holders.items()}


def _pieces(described: Described, piece_bytes: int) -> Iterator[WriteItem]:
    box = described.held.box
    for part in _cut(box, dtype_of(described.dtype).itemsize, piece_bytes):
        yield _item(_Shared, described, part)


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


def _item(cls: type[WriteItem], described: Described, box: Box) -> WriteItem:
    return box_item(cls, described.name, described.dtype, described.shape, box.offsets, box.sizes)


def _place(
    plans: tuple[SavePlan, SavePlan], shard: int, held_by: Mapping[Corner, tuple[int, ...]], world_size: int
) -> Iterator[Chunk]:
    """Place the pieces of a shard: first the static ones, then the others."""
    at = 0

    def place_of(item: WriteItem) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
        corner = item.index.fqn, tuple(item.index.offset or ())
        # Pieces that the same ranks have are contiguous, so that what a rank lacks is sent in few messages.
        return held_by[corner], *corner

    static, changing = (sorted(plan.items, key=place_of) for plan in plans)
    for index, item in enumerate(static + changing):
        data = item.tensor_data
        assert data is not None
        ranks, _, offsets = place_of(item)
        yield Chunk(
            name=item.index.fqn,
            dtype=str(data.properties.dtype),
            shape=tuple(data.size),
            offsets=offsets,
            sizes=tuple(data.chunk.sizes),
            shard=shard,
            at=at,
            nbytes=item_bytes(item),
            holders=ranks if len(ranks) < world_size else (),
            static=index < len(static),
        )
        at = aligned(at + item_bytes(item))
