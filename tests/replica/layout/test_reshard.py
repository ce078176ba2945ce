"""A version read at another world size: every element reaches its place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.replica.layout.layout import Layout, live_views, slot_views
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.reshard import fill_resharded, plan_reads, shards_in
from lightning_ckptless.replica.layout.tensor_spec import Box, Described, Held

ROWS, COLUMNS = 13, 3
WHOLE = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
BIAS = torch.arange(5, dtype=torch.float64)


def rows_of(rank: int, ranks: int) -> tuple[int, int]:
    """First row and number of rows of a rank in a sharded dimension; the last ranks may get fewer."""
    each = -(-ROWS // ranks)
    low = min(rank * each, ROWS)
    return low, min(each, ROWS - low)


def tensors_of(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    low, count = rows_of(rank, ranks)
    return {"weight": WHOLE[low : low + count].clone(), "bias": BIAS.clone(), "own": torch.full((2,), float(rank))}


def written_by(ranks: int) -> tuple[Layout, dict[int, torch.Tensor]]:
    """A layout and the shards of the ranks."""
    described = []
    for rank in range(ranks):
        low, count = rows_of(rank, ranks)
        weight = Described("weight", "torch.float32", (ROWS, COLUMNS), True, Box((low, 0), (count, COLUMNS)))
        described.append(
            [weight, Described("bias", "torch.float64", (5,), True), Described("own", "torch.float32", (2,), False)]
        )
    layout = plan_layout(described)
    bulks = {shard: torch.zeros(layout.bulk_bytes(shard), dtype=torch.uint8) for shard in range(ranks)}
    for shard, bulk in bulks.items():
        views = slot_views(layout, shard, bulk, rank=shard)
        for view, live in zip(views, live_views(layout, shard, shard, tensors_of(shard, ranks)), strict=True):
            view.copy_(live)
    return layout, bulks


@given(st.integers(1, 6), st.integers(1, 6))
def test_every_element_reaches_its_place(before: int, now: int) -> None:
    layout, bulks = written_by(before)
    for rank in range(now):
        low, count = rows_of(rank, now)
        held = {
            "bias": Held("torch.float64", (5,), Box((0,), (5,))),
            "own": Held("torch.float32", (2,), Box((0,), (2,))),
        }
        if count:
            held["weight"] = Held("torch.float32", (ROWS, COLUMNS), Box((low, 0), (count, COLUMNS)))
        live = {name: torch.full_like(tensor, -1) for name, tensor in tensors_of(rank, now).items()}
        reads = plan_reads(layout, held, home=rank % before)
        fill_resharded(reads, {shard: bulks[shard] for shard in shards_in(reads)}, live)
        assert torch.equal(live["weight"], WHOLE[low : low + count])
        assert torch.equal(live["bias"], BIAS)
        assert live["own"].tolist() == [rank % before] * 2


@pytest.mark.parametrize(
    ("name", "held", "text"),
    [
        ("other", Held("torch.float32", (2,), Box((0,), (2,))), "other is new"),
        ("bias", Held("torch.float64", (6,), Box((0,), (6,))), "whose shape depends on the world size"),
        ("bias", Held("torch.float32", (5,), Box((0,), (5,))), r"it is float64\[5\]"),
    ],
)
def test_the_error_names_a_tensor_that_differs_in_the_version(name: str, held: Held, text: str) -> None:
    layout, _ = written_by(2)
    with pytest.raises(LayoutMismatchError, match=text):
        plan_reads(layout, {name: held}, home=0)
