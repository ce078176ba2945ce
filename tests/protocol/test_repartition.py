"""Every micro-batch of an epoch is run once, at every sequence of world sizes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.repartition import Repartition

worlds = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=5)


@given(st.integers(1, 6), st.integers(1, 8), worlds)
def test_every_micro_batch_counts_once(virtual_ranks: int, length: int, changes: list[tuple[int, int]]) -> None:
    """Each world size runs some steps, the last one all that are left."""
    seen: Counter[tuple[int, int]] = Counter()
    begin = 0
    for number, (world_size, most) in enumerate(changes):
        repartition = Repartition(virtual_ranks, length, begin, world_size)
        steps = repartition.steps if number == len(changes) - 1 else min(most, repartition.steps)
        for rank in range(world_size):
            for step, batch in enumerate(repartition.batches_of(rank)[:steps]):
                seen[batch] += repartition.weight(rank, step) > 0
        begin = repartition.after(steps)
    assert seen == {(virtual_rank, position): 1 for virtual_rank in range(virtual_ranks) for position in range(length)}


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 48), st.integers(1, 7))
def test_all_ranks_run_the_same_number_of_steps(virtual_ranks: int, length: int, begin: int, world_size: int) -> None:
    repartition = Repartition(virtual_ranks, length, min(begin, virtual_ranks * length), world_size)
    assert {len(repartition.batches_of(rank)) for rank in range(world_size)} == {repartition.steps}
    for step in range(repartition.steps):
        assert sum(repartition.weight(rank, step) for rank in range(world_size)) / world_size == pytest.approx(1.0)


def test_a_third_rank_joins() -> None:
    repartition = Repartition(virtual_ranks=2, length=4, begin=4, world_size=3)
    assert [repartition.batches_of(rank) for rank in range(3)] == [((0, 2), (1, 3)), ((1, 2), (1, 3)), ((0, 3), (1, 3))]
    assert [repartition.weight(rank, 1) for rank in range(3)] == [3.0, 0.0, 0.0]
