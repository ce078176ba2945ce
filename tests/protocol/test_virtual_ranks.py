"""Virtual ranks: each is run by exactly one rank, at every world size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.errors import WorldSizeError
from lightning_ckptless.protocol.virtual_ranks import (
    assign,
    rank_running,
    require_world,
    share_of,
    virtual_ranks_of,
)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[int, int, int]:
    virtual_ranks = draw(st.integers(1, 24))
    return draw(st.integers(1, virtual_ranks)), draw(st.integers(1, virtual_ranks)), virtual_ranks


@given(worlds())
def test_every_virtual_rank_is_run_once(world: tuple[int, int, int]) -> None:
    world_size, _, virtual_ranks = world
    assigned = [virtual_ranks_of(rank, world_size, virtual_ranks) for rank in range(world_size)]
    assert sorted(virtual_rank for of_rank in assigned for virtual_rank in of_rank) == list(range(virtual_ranks))
    assert all(of_rank[0] == rank for rank, of_rank in enumerate(assigned))
    assert max(map(len, assigned)) - min(map(len, assigned)) <= 1
    assert all(
        rank_running(virtual_rank, world_size) == rank
        for rank, of_rank in enumerate(assigned)
        for virtual_rank in of_rank
    )


@given(worlds())
def test_every_source_is_used_exactly_once(world: tuple[int, int, int]) -> None:
    world_size, before, virtual_ranks = world
    assignees = [assign(rank, world_size, before=before, virtual_ranks=virtual_ranks) for rank in range(world_size)]
    assert sorted(source for assignee in assignees for source in assignee.sums) == list(range(before))
    for assignee in assignees:
        for virtual_rank, source in assignee.virtual_ranks.items():
            assert virtual_rank in virtual_ranks_of(source, before, virtual_ranks)
        assert set(assignee.sources) >= {assignee.home, *assignee.sums}


@given(worlds(), st.integers(1, 4))
def test_ranks_that_share_a_virtual_rank_have_parallel_assignments(world: tuple[int, int, int], width: int) -> None:
    world_size, before, virtual_ranks = world
    for rank in range(world_size * width):
        assignee = assign(rank, world_size * width, before=before * width, virtual_ranks=virtual_ranks, width=width)
        alone = assign(rank // width, world_size, before=before, virtual_ranks=virtual_ranks)
        assert assignee.sources == tuple(source * width + rank % width for source in alone.sources)


@given(worlds())
def test_at_the_same_world_size_each_rank_takes_over_its_own_state(world: tuple[int, int, int]) -> None:
    world_size, _, virtual_ranks = world
    for rank in range(world_size):
        assignee = assign(rank, world_size, before=world_size, virtual_ranks=virtual_ranks)
        assert assignee.sources == (rank,)
        assert assignee.sums == (rank,)


@given(worlds())
def test_the_mean_over_ranks_is_the_mean_over_virtual_ranks(world: tuple[int, int, int]) -> None:
    world_size, _, virtual_ranks = world
    gradients = [float(virtual_rank + 1) for virtual_rank in range(virtual_ranks)]
    share = share_of(world_size, virtual_ranks)
    sums = [
        sum(share * gradients[s] for s in virtual_ranks_of(rank, world_size, virtual_ranks))
        for rank in range(world_size)
    ]
    assert sum(sums) / world_size == pytest.approx(sum(gradients) / virtual_ranks)


def test_more_ranks_than_virtual_ranks_are_refused() -> None:
    with pytest.raises(WorldSizeError, match="4 virtual ranks, but 5 ranks were started"):
        require_world(5, before=4, virtual_ranks=4, obstacle=None)


def test_an_obstacle_matters_only_if_a_rank_would_run_two() -> None:
    assert "its own virtual rank" in require_world(4, before=3, virtual_ranks=4, obstacle="steps by itself")
    with pytest.raises(WorldSizeError, match="steps by itself"):
        require_world(3, before=4, virtual_ranks=4, obstacle="steps by itself")


def test_the_description_says_how_many_micro_batches_each_rank_runs() -> None:
    assert "so 2 micro-batches per step on 1 of the ranks, 1 on the others;" in require_world(
        3, before=4, virtual_ranks=4, obstacle=None
    )
    assert "so 2 micro-batches per step on each rank;" in require_world(2, before=4, virtual_ranks=4, obstacle=None)
