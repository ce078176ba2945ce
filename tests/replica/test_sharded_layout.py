"""Layouts of sharded models: each box is stored once, however many ranks have it."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.replica.layout.layout import Layout, live_views, part_of, slot_views
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import Box, Described
from lightning_ckptless.replica.mirror.staging import Stager
from lightning_ckptless.replica.restore import fill

Shape = tuple[int, ...]
meshes = st.tuples(st.integers(1, 3), st.integers(1, 3))
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
"""Shape of a tensor; many are not divisible by the number of ranks."""
dims = st.one_of(st.none(), st.integers(0, 2))
"""The tensor dimension that a mesh dimension shards; None if it replicates."""


def split(size: int, parts: int, part: int) -> tuple[int, int]:
    """Start and length of a part, as torch divides: equal parts, the last ones shorter or empty."""
    each = -(-size // parts)
    begin = min(each * part, size)
    return begin, min(begin + each, size) - begin


def box_of(shape: Shape, mesh: tuple[int, int], sharded: tuple[int | None, int | None], rank: int) -> Box:
    """The box of a rank in a mesh."""
    offsets, sizes = [0] * len(shape), list(shape)
    for ranks, at, dim in zip(mesh, divmod(rank, mesh[1]), sharded, strict=True):
        if dim is not None and dim < len(shape):
            begin, sizes[dim] = split(sizes[dim], ranks, at)
            offsets[dim] += begin
    return Box(tuple(offsets), tuple(sizes))


def cut_out(whole: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(*box, strict=True)):
        whole = whole.narrow(dim, offset, size)
    return whole.clone()


def describe_parts(name: str, shape: Shape, boxes: list[Box]) -> list[tuple[Described, ...]]:
    return [(Described(name, "torch.float32", shape, replicated=True, box=box),) for box in boxes]


@settings(max_examples=120, deadline=None)
@given(mesh=meshes, shape=shapes, sharded=st.tuples(dims, dims))
def test_every_rank_finds_its_part_and_all_parts_form_the_whole(
    mesh: tuple[int, int], shape: Shape, sharded: tuple[int | None, int | None]
) -> None:
    ranks = math.prod(mesh)
    boxes = [box_of(shape, mesh, sharded, rank) for rank in range(ranks)]
    layout = plan_layout(describe_parts("w", shape, boxes))
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    parts = [cut_out(whole, box) for box in boxes]
    bulks = {shard: torch.zeros(layout.bulk_bytes(shard), dtype=torch.uint8) for shard in range(ranks)}
    for shard, bulk in bulks.items():
        live = live_views(layout, shard, shard, {"w": parts[shard]})
        for target, source in zip(slot_views(layout, shard, bulk), live, strict=True):
            target.copy_(source)
    # Each box is stored once, however many ranks have it.
    assert sum(chunk.nbytes for chunk in layout.chunks) == 4 * math.prod(shape)
    again = torch.full_like(whole, -1.0)
    for shard, bulk in bulks.items():
        for piece, view in zip(layout.of(shard), slot_views(layout, shard, bulk), strict=True):
            part_of(again, piece, (0,) * len(shape)).copy_(view)
    assert torch.equal(again, whole)
    for rank, part in enumerate(parts):
        restored = torch.full_like(part, -1.0)
        fill(layout, {shard: bulks[shard] for shard in layout.need[rank]}, {"w": restored}, rank)
        assert torch.equal(restored, part)


def test_a_box_that_several_ranks_have_is_divided_over_them() -> None:
    shape = (4096, 16)
    boxes = [Box((2048 * (rank % 2), 0), (2048, 16)) for rank in range(4)]
    layout = plan_layout(describe_parts("w", shape, boxes))
    shares = [sum(chunk.nbytes for chunk in layout.of(shard)) for shard in range(4)]
    assert shares == [4096 * 16 * 4 // 4] * 4
    assert {chunk.holders for chunk in layout.chunks} == {(0, 2), (1, 3)}
    assert layout.need == {0: (0, 2), 1: (1, 3), 2: (0, 2), 3: (1, 3)}


def test_a_box_of_a_single_rank_is_written_by_it_and_not_cut() -> None:
    boxes = [Box((1000 * rank, 0), (1000, 100)) for rank in range(2)]
    layout = plan_layout(describe_parts("w", (2000, 100), boxes))
    assert [(chunk.shard, chunk.holders, chunk.sizes) for chunk in layout.chunks] == [
        (0, (0,), (1000, 100)),
        (1, (1,), (1000, 100)),
    ]


def test_a_rank_knows_tensors_of_which_it_has_no_part() -> None:
    boxes = [Box((0, 0), (1, 3)), Box((1, 0), (0, 3))]
    layout = plan_layout(describe_parts("w", (1, 3), boxes))
    assert layout.held_by(1) == {}
    assert layout.known_to(1) == {"w": (torch.float32, (1, 3))}
    assert layout.need == {0: (0,), 1: ()}


@pytest.mark.parametrize(("digests", "names"), [(("a", "a"), {"w"}), (("a", "b"), {"rank0/w", "rank1/w"})])
def test_tensors_that_differ_between_ranks_are_private(digests: tuple[str, str], names: set[str]) -> None:
    per_rank = [[Described("w", "torch.float32", (8,), replicated=True, digest=digest)] for digest in digests]
    layout = plan_layout(per_rank)
    assert {chunk.name for chunk in layout.chunks} == names
    for rank, described in enumerate(per_rank):
        layout.require_same(described, rank)


def test_the_error_names_a_tensor_that_is_sharded_differently() -> None:
    rows, columns = ([Box((4 * r, 0), (4, 8)) for r in range(2)], [Box((0, 4 * r), (8, 4)) for r in range(2)])
    layout = plan_layout(describe_parts("w", (8, 8), rows))
    with pytest.raises(LayoutMismatchError, match=r"w is \[8, 4\] from \[0, 4\] of float32\[8, 8\], expected \[4, 8\]"):
        layout.require_same(describe_parts("w", (8, 8), columns)[1], 1)


def test_boxes_of_different_tensors_are_refused() -> None:
    one = describe_parts("w", (8,), [Box((0,), (4,))])[0]
    other = describe_parts("w", (9,), [Box((4,), (5,))])[0]
    with pytest.raises(LayoutMismatchError, match="rank 1: w is"):
        plan_layout([one, other])


def test_a_sharded_layout_is_parsed_from_its_bytes() -> None:
    boxes = [Box((row, column), (1, 2)) for row, column in product(range(2), (0, 2))]
    layout = plan_layout(describe_parts("w", (2, 4), boxes))
    again = Layout.from_bytes(layout.to_bytes(), layout.digest)
    assert again.chunks == layout.chunks and again.digest == layout.digest and again.need == layout.need
    starts = sorted(chunk.offsets for chunk in again.chunks)
    assert all(low != high for low, high in pairwise(starts))


def test_the_error_names_a_part_whose_shape_changes_during_training() -> None:
    boxes = [Box((3, 0), (2, 4)), Box((0, 0), (3, 4))]
    layout = plan_layout(describe_parts("head.weight", (5, 4), boxes))
    bulk = torch.zeros(layout.bulk_bytes(0), dtype=torch.uint8)
    stager = Stager(layout, 0)
    stager.take(bulk, {"head.weight": torch.zeros(2, 4)}, ())
    with pytest.raises(LayoutMismatchError, match=r"head.weight is torch.float32\[5, 2\], expected \[2, 4\]"):
        stager.take(bulk, {"head.weight": torch.zeros(5, 2)}, ())
