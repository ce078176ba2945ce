"""VirtualRanks: every one carried by exactly one rank, whatever the worlds were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.errors import WorldSizeError
from lightning_ckptless.protocol.virtual_ranks import carrier_of, inherit, require_world, share_of, streams_of


@st.composite
def worlds(draw: st.DrawFn) -> tuple[int, int, int]:
    streams = draw(st.integers(1, 24))
    return draw(st.integers(1, streams)), draw(st.integers(1, streams)), streams


@given(worlds())
def test_every_stream_is_carried_once(world: tuple[int, int, int]) -> None:
    world_size, _, streams = world
    carried = [streams_of(rank, world_size, streams) for rank in range(world_size)]
    assert sorted(stream for of_rank in carried for stream in of_rank) == list(range(streams))
    assert all(of_rank[0] == rank for rank, of_rank in enumerate(carried))
    assert max(map(len, carried)) - min(map(len, carried)) <= 1
    assert all(carrier_of(stream, world_size) == rank for rank, of_rank in enumerate(carried) for stream in of_rank)


@given(worlds())
def test_nothing_is_lost_or_taken_twice(world: tuple[int, int, int]) -> None:
    world_size, before, streams = world
    assignees = [inherit(rank, world_size, before=before, streams=streams) for rank in range(world_size)]
    assert sorted(source for assignee in assignees for source in assignee.sums) == list(range(before))
    for assignee in assignees:
        for stream, source in assignee.streams.items():
            assert stream in streams_of(source, before, streams)
        assert set(assignee.sources) >= {assignee.home, *assignee.sums}


@given(worlds(), st.integers(1, 4))
def test_ranks_that_share_a_stream_inherit_side_by_side(world: tuple[int, int, int], width: int) -> None:
    world_size, before, streams = world
    for rank in range(world_size * width):
        assignee = inherit(rank, world_size * width, before=before * width, streams=streams, width=width)
        alone = inherit(rank // width, world_size, before=before, streams=streams)
        assert assignee.sources == tuple(source * width + rank % width for source in alone.sources)


@given(worlds())
def test_same_world_inherits_itself(world: tuple[int, int, int]) -> None:
    world_size, _, streams = world
    for rank in range(world_size):
        assignee = inherit(rank, world_size, before=world_size, streams=streams)
        assert assignee.sources == (rank,)
        assert assignee.sums == (rank,)


@given(worlds())
def test_mean_over_ranks_is_the_mean_over_streams(world: tuple[int, int, int]) -> None:
    world_size, _, streams = world
    gradients = [float(stream + 1) for stream in range(streams)]
    share = share_of(world_size, streams)
    sums = [sum(share * gradients[s] for s in streams_of(rank, world_size, streams)) for rank in range(world_size)]
    assert sum(sums) / world_size == pytest.approx(sum(gradients) / streams)


def test_more_ranks_than_streams_are_refused() -> None:
    with pytest.raises(WorldSizeError, match="4 streams of samples, 5 ranks are started"):
        require_world(5, before=4, streams=4, obstacle=None)


def test_obstacle_matters_only_where_a_rank_would_carry_two() -> None:
    assert "its own stream" in require_world(4, before=3, streams=4, obstacle="steps by itself")
    with pytest.raises(WorldSizeError, match="steps by itself"):
        require_world(3, before=4, streams=4, obstacle="steps by itself")


def test_plan_names_who_runs_how_many() -> None:
    assert "so 2 micro-batches a step on 1 of the ranks, 1 on the others;" in require_world(
        3, before=4, streams=4, obstacle=None
    )
    assert "so 2 micro-batches a step on each rank;" in require_world(2, before=4, streams=4, obstacle=None)
