"""Dividing the state into shards of about equal size, each element exactly once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_ckptless.errors import LayoutMismatchError, OptionsError
from lightning_ckptless.replica.layout.layout import ALIGNMENT_BYTES, Layout, live_views, slot_views
from lightning_ckptless.replica.layout.planner import PIECE_BYTES_LEAST, PIECES_PER_RANK, plan_layout
from lightning_ckptless.replica.layout.tensor_spec import Box, Described, describe, differences, held_by_name

DTYPES = [torch.float32, torch.bfloat16, torch.bool, torch.int8, torch.int64, torch.complex64, torch.float64]
Sizes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
tensors = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4), st.tuples(st.sampled_from(DTYPES), shapes), max_size=8
)


def described(sizes: Sizes, *, replicated: bool) -> tuple[Described, ...]:
    return tuple(Described(name, str(dtype), shape, replicated) for name, (dtype, shape) in sizes.items())


@settings(max_examples=60, deadline=None)
@given(common=tensors, private=st.lists(tensors, min_size=1, max_size=4))
def test_every_element_is_in_exactly_one_piece(common: Sizes, private: list[Sizes]) -> None:
    per_rank = [described(common, replicated=True) + described(own, replicated=False) for own in private]
    layout = plan_layout(per_rank)
    expected = {name: math.prod(shape) for name, (_, shape) in common.items()}
    for rank, own in enumerate(private):
        expected |= {f"rank{rank}/{name}": math.prod(shape) for name, (_, shape) in own.items()}
    seen: dict[str, torch.Tensor] = {}
    for chunk in layout.chunks:
        cover = torch.zeros(chunk.shape, dtype=torch.int32)
        box = cover
        for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            box = box.narrow(dim, offset, size)
        box += 1
        seen[chunk.name] = cover + seen.get(chunk.name, torch.zeros(()))
    assert seen.keys() == expected.keys()
    for name, cover in seen.items():
        assert cover.numel() == expected[name] and bool((cover == 1).all())


@settings(max_examples=60, deadline=None)
@given(common=tensors, world_size=st.integers(1, 5))
def test_pieces_of_a_shard_do_not_overlap_and_are_aligned(common: Sizes, world_size: int) -> None:
    layout = plan_layout([described(common, replicated=True)] * world_size)
    for shard in range(world_size):
        end = 0
        for chunk in layout.of(shard):
            assert chunk.at >= end and chunk.at % ALIGNMENT_BYTES == 0
            assert chunk.nbytes == math.prod(chunk.sizes) * getattr(torch, chunk.dtype.split(".")[1]).itemsize
            end = chunk.at + chunk.nbytes
        assert end <= layout.bulk_bytes(shard) < end + ALIGNMENT_BYTES


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 300)), min_size=1, max_size=30),
    world_size=st.integers(1, 9),
)
def test_shards_differ_by_at_most_one_piece(sizes: list[tuple[int, int]], world_size: int) -> None:
    common = {f"t{i}": (torch.float32, shape) for i, shape in enumerate(sizes)}
    layout = plan_layout([described(common, replicated=True)] * world_size)
    total_bytes = sum(chunk.nbytes for chunk in layout.chunks)
    shares = [sum(chunk.nbytes for chunk in layout.of(shard)) for shard in range(world_size)]
    assert max(shares) - min(shares) <= max(chunk.nbytes for chunk in layout.chunks)
    assert max(chunk.nbytes for chunk in layout.chunks) <= max(
        total_bytes / (PIECES_PER_RANK * world_size), PIECE_BYTES_LEAST
    )


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 8])
def test_shards_of_a_model_differ_by_a_few_percent(world_size: int) -> None:
    common: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"embedding": (torch.float32, (30000, 384))}
    for block in range(6):
        common[f"{block}.attention"] = (torch.float32, (1152, 384))
        common[f"{block}.mlp"] = (torch.float32, (384, 1536))
        common[f"{block}.norm"] = (torch.float32, (384,))
    layout = plan_layout([described(common, replicated=True)] * world_size)
    shares = [layout.bulk_bytes(shard) for shard in range(world_size)]
    assert max(shares) <= 1.04 * sum(shares) / world_size


def test_a_thousand_ranks_are_planned_at_once() -> None:
    """Ranks that describe their state alike are read once, and each piece is placed once."""
    common = described({f"w{i}": (torch.float32, (1024, 256)) for i in range(64)}, replicated=True)
    layout = plan_layout([common] * 1024)
    sizes = [layout.bulk_bytes(shard) for shard in range(1024)]
    assert sum(chunk.nbytes for chunk in layout.chunks) == 64 * 1024 * 256 * 4
    assert max(sizes) - min(sizes) <= PIECE_BYTES_LEAST
    assert layout.need[0] is layout.need[1023]


def test_parts_of_a_sharded_tensor_must_cover_it() -> None:
    half = Described("w", "torch.float32", (4, 4), True, box=Box((0, 0), (2, 4)))
    with pytest.raises(LayoutMismatchError, match="w: the ranks have 8 elements of 16"):
        plan_layout([(half,), (half,)])


def test_private_tensors_are_in_the_shard_of_their_rank() -> None:
    common = {"weight": (torch.float32, (1000, 100))}
    own = {"running_mean": (torch.float32, (5000,))}
    layout = plan_layout([described(common, replicated=True) + described(own, replicated=False)] * 3)
    for rank in range(3):
        private = [chunk for chunk in layout.of(rank) if chunk.name.endswith("running_mean")]
        assert [chunk.name for chunk in private] == [f"rank{rank}/running_mean"]
    shares = [layout.bulk_bytes(shard) for shard in range(3)]
    assert max(shares) - min(shares) <= PIECE_BYTES_LEAST + ALIGNMENT_BYTES * 32


@settings(max_examples=30, deadline=None)
@given(common=tensors, world_size=st.integers(1, 3))
def test_a_layout_is_parsed_from_its_bytes(common: Sizes, world_size: int) -> None:
    layout = plan_layout([described(common, replicated=True)] * world_size)
    again = Layout.from_bytes(layout.to_bytes(), layout.digest)
    assert again.chunks == layout.chunks and again.digest == layout.digest


def test_the_metadata_equals_that_of_a_checkpoint() -> None:
    common = {"weight": (torch.float32, (2000, 100)), "scale": (torch.bfloat16, ())}
    layout = plan_layout([described(common, replicated=True)] * 2)
    found = layout.metadata.state_dict_metadata
    weight, scale = found["weight"], found["scale"]
    assert isinstance(weight, TensorStorageMetadata) and isinstance(scale, TensorStorageMetadata)
    assert weight.size == torch.Size((2000, 100)) and scale.size == torch.Size(())
    assert sum(math.prod(tuple(chunk.sizes)) for chunk in weight.chunks) == 200_000


def test_different_layouts_have_different_digests() -> None:
    one = plan_layout([described({"w": (torch.float32, (4, 4))}, replicated=True)])
    other = plan_layout([described({"w": (torch.float32, (4, 5))}, replicated=True)])
    assert one.digest != other.digest


def test_every_kind_of_tensor_survives_a_bulk(state: dict[str, torch.Tensor]) -> None:
    layout = plan_layout([describe(state, replicated=True)] * 2)
    restored = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for shard in range(2):
        bulk = torch.zeros(layout.bulk_bytes(shard), dtype=torch.uint8)
        for target, source in zip(slot_views(layout, shard, bulk), live_views(layout, shard, 0, state), strict=True):
            target.copy_(source)
        for target, source in zip(live_views(layout, shard, 0, restored), slot_views(layout, shard, bulk), strict=True):
            target.copy_(source)
    for name, tensor in state.items():
        assert torch.equal(restored[name], tensor), name


def test_differences_name_the_tensors() -> None:
    common = {"a": (torch.float32, (2,)), "b": (torch.float32, (3,)), "c": (torch.float32, ())}
    other = {"a": (torch.float32, (2,)), "b": (torch.float16, (3,)), "d": (torch.int64, (1,))}
    before, after = (held_by_name(described(sizes, replicated=True)) for sizes in (common, other))
    assert differences(before, after) == [
        "b is float16[3], expected float32[3]",
        "c is missing, expected float32[]",
        "d is new, int64[1]",
    ]
    assert differences(before, after, limit=1) == ["b is float16[3], expected float32[3]", "and 2 more"]
    assert differences(before, before) == []


def test_the_error_for_another_model_names_the_tensor() -> None:
    before, after = (described({"w": (torch.float32, (size,))}, replicated=True) for size in (2, 3))
    layout = plan_layout([before])
    layout.require_same(before, 0)
    with pytest.raises(LayoutMismatchError, match=r"rank 0: .*w is float32\[3\], expected float32\[2\]"):
        layout.require_same(after, 0)


def test_private_tensors_of_other_ranks_are_not_compared() -> None:
    one, two = (described({"m": (torch.float32, (size,))}, replicated=False) for size in (2, 3))
    saved = plan_layout([one, two])
    saved.require_same(one, 0)
    with pytest.raises(LayoutMismatchError, match=r"m is float32\[2\], expected float32\[3\]"):
        saved.require_same(one, 1)


def test_ranks_that_differ_are_refused() -> None:
    with pytest.raises(LayoutMismatchError, match="rank 1: w is"):
        plan_layout([described({"w": (torch.float32, (size,))}, replicated=True) for size in (2, 3)])


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(OptionsError, match=r"w: a tensor of layout torch\.sparse_coo"):
        describe({"w": torch.eye(3).to_sparse()}, replicated=True)
