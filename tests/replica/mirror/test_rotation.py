"""Ranks that do not keep a shard are compared in turns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.placement import place
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.mirror import rotation
from lightning_ckptless.replica.mirror.rotation import Audited, Rotation
from tests.replica.world import MakeWorld, State, World


def rotations(world_size: int, copies: int) -> list[Rotation]:
    layout = plan_layout([describe({"weight": torch.zeros(64)}, replicated=True)] * world_size)
    holders = place([str(rank) for rank in range(world_size)], copies).holders
    return [Rotation(layout, rank, holders) for rank in range(world_size)]


@given(st.integers(2, 9), st.data())
def test_every_rank_compares_every_shard_that_it_does_not_have(world_size: int, data: st.DataObject) -> None:
    copies = data.draw(st.integers(1, world_size - 1))
    first = data.draw(st.integers(0, 1000))
    ranks = rotations(world_size, copies)
    holders = place([str(rank) for rank in range(world_size)], copies).holders
    compared = set()
    for number in range(first, first + world_size - 1):
        turns = [each.turn(number) for each in ranks]
        for rank, turn in enumerate(turns):
            assert turn.shard is None or turns[turn.shard].auditor == rank
            assert turn.auditor is None or turns[turn.auditor].shard == rank
            compared |= set() if turn.shard is None else {(rank, turn.shard)}
    everyone = range(world_size)
    assert compared == {(r, s) for r in everyone for s in everyone if r != s and r not in holders[s]}


def test_nothing_is_compared_where_no_rank_keeps_a_copy() -> None:
    ranks = rotations(4, 0)
    assert {(turn.shard, turn.auditor) for rank in ranks for turn in map(rank.turn, range(9))} == {(None, None)}


def run_until_found(world: World, states: list[State], rounds: int) -> int:
    for step in range(1, rounds + 1):
        for rank, state in enumerate(states):
            world.mirrors[rank].submit(Version(step, True), state, f"blob {rank} {step}".encode())
        world.settle()
        if world.mirrors[0].difference is not None:
            return step
    return 0


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize("part_bytes", [1, 4 << 20])
def test_a_flip_on_any_rank_is_found_in_its_turn(
    world: MakeWorld, wrong: int, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "PART_BYTES", part_bytes)
    ranks = world(4).begin()
    layout = ranks.layout()
    # A piece that this rank neither writes nor keeps.
    chunk = next(
        chunk
        for chunk in reversed(layout.chunks)
        if chunk.name == "weight" and wrong not in (chunk.shard, *ranks.placement.holders[chunk.shard])
    )
    states = [ranks.tensors(1) for _ in range(4)]
    states[wrong]["weight"][chunk.offsets[0], 0] += 1
    parts = sum(not each.holders for each in layout.of(chunk.shard)) if part_bytes == 1 else 1
    assert 1 <= run_until_found(ranks, states, 3 * parts) <= 3 * parts
    for mirror in ranks.mirrors:
        assert mirror.difference is not None
        assert mirror.difference.shards == (chunk.shard,) and mirror.difference.pieces == ()


def test_equal_ranks_are_never_found(world: MakeWorld) -> None:
    ranks = world(4).begin()
    for mirror in ranks.mirrors:
        mirror.bind(["bias"])
    assert run_until_found(ranks, [ranks.tensors(1) for _ in range(4)], 7) == 0
    assert ranks.newest() == 7


def test_a_round_without_data_says_nothing(world: MakeWorld) -> None:
    ranks = world(4).begin()
    ranks.submit(1)
    ranks.settle()
    for step in range(2, 6):
        ranks.mirrors[step % 4].skip(Version(step, True))
        ranks.submit(step, ranks=[rank for rank in range(4) if rank != step % 4])
    ranks.submit(6)
    assert ranks.settle() == [Version(6, True)] * 4


def test_a_tensor_that_was_written_to_says_nothing() -> None:
    weight = torch.zeros(8)
    audited = Audited([weight[2:4]], [weight])
    weight.add_(1)
    assert audited.digest() == "" and Audited([], []).digest() == ""
    assert Audited([weight[2:4]], [weight]).digest().startswith("xxh3:")
