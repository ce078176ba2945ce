"""Replicas that differ: found in the round of their version, located, and never committed."""

from __future__ import annotations

import pytest
import torch

from lightning_ckptless.protocol.versions import SlotState, Version
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from tests.replica.world import MakeWorld, State, World


def submit(world: World, step: int, states: list[State]) -> None:
    for rank, state in enumerate(states):
        world.mirrors[rank].submit(Version(step, True), state, f"blob {rank} {step}".encode())


def states_of(world: World, step: int) -> list[State]:
    return [world.tensors(step) for _ in range(world.size)]


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("row", [0, 100, 199])
def test_a_flipped_bit_aborts_the_round_and_is_located(world: MakeWorld, wrong: int, row: int) -> None:
    ranks = world(3, copies=2).begin()
    ranks.submit(1)
    ranks.settle()
    states = states_of(ranks, 2)
    states[wrong]["weight"][row, 3] += 0.5
    submit(ranks, 2, states)
    assert ranks.settle() == [Version(1, True)] * 3
    for mirror in ranks.mirrors:
        difference = mirror.difference
        assert difference is not None and difference.version == Version(2, True)
        [piece] = difference.pieces
        assert piece.name == "weight" and piece.offsets[0] <= row < piece.offsets[0] + piece.sizes[0]
        assert difference.ranks == (0, 1, 2) and difference.wrong == (wrong,)
        assert mirror.rewind.is_agreed and mirror.in_doubt
    assert ranks.newest() == 1 and ranks.values() == {1.0}


def test_two_ranks_cannot_tell_which_is_wrong(world: MakeWorld) -> None:
    ranks = world(2).begin()
    states = states_of(ranks, 1)
    states[1]["bias"][7] = 3
    submit(ranks, 1, states)
    assert ranks.settle() == [None, None]
    for mirror in ranks.mirrors:
        assert mirror.difference is not None and mirror.difference.ranks == (0, 1) and mirror.difference.wrong == ()
    assert "bias" in str(ranks.mirrors[0].difference) and "differ between ranks 0, 1" in str(
        ranks.mirrors[0].difference
    )


def test_no_version_is_committed_after_a_difference(world: MakeWorld) -> None:
    ranks = world(2).begin()
    ranks.submit(1)
    ranks.settle()
    states = states_of(ranks, 2)
    states[1]["bias"][7] = 3
    submit(ranks, 2, states)
    ranks.submit(3)
    assert ranks.settle() == [Version(1, True)] * 2
    assert [mirror.stats.differing for mirror in ranks.mirrors] == [2, 2]
    states_of_slots = {replica.state for arena in ranks.arenas for replica in arena.inventory()}
    assert states_of_slots == {SlotState.COMMITTED, SlotState.EMPTY}


def test_a_private_tensor_is_sent_and_may_differ(world: MakeWorld) -> None:
    ranks = world(2).begin()
    states = states_of(ranks, 1)
    states[1]["mean"].fill_(5)
    submit(ranks, 1, states)
    assert ranks.settle() == [Version(1, True)] * 2
    assert ranks.values(without=[0]) == ranks.values(without=[1]) == {1.0, 5.0}


def test_a_holder_without_any_tensor_of_its_source_receives_all(world: MakeWorld) -> None:
    states = [{"mean": torch.full((9,), float(rank))} for rank in range(2)]
    layout = plan_layout([describe(state, replicated=False) for state in states])
    ranks = world(2).begin(layout=layout)
    for step in (1, 2):
        for rank, state in enumerate(states):
            ranks.mirrors[rank].submit(Version(step, True), state, b"")
        assert ranks.settle() == [Version(step, True)] * 2


def test_replicas_that_are_sent_may_differ(world: MakeWorld) -> None:
    ranks = world(2).begin(verifies=False)
    states = states_of(ranks, 1)
    states[1]["bias"][7] = 3
    submit(ranks, 1, states)
    assert ranks.settle() == [Version(1, True)] * 2 and ranks.mirrors[0].difference is None
    assert not ranks.mirrors[0].in_doubt
    assert ranks.values(without=[0]) == ranks.values(without=[1])


def test_writers_that_die_before_the_vote_leave_no_complete_version(world: MakeWorld) -> None:
    """Both replicas are intact, and which of them is right is unknown."""
    ranks = world(2).begin()
    ranks.submit(1)
    ranks.settle()
    states = states_of(ranks, 2)
    states[1]["bias"][7] = 3
    for mirror in ranks.mirrors:
        mirror._discard = lambda *_: None  # type: ignore[method-assign]
    submit(ranks, 2, states)
    ranks.settle()
    assert {replica.version.optimizer_step for arena in ranks.arenas for replica in arena.inventory()} == {1, 2}
    assert ranks.newest() == 1
