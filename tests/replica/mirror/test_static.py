"""Static tensors are written and sent once per slot; tensors wrongly expected to be static are mirrored anyway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lightning_ckptless.errors import TransportError
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.checksum import digest, joined, matches
from lightning_ckptless.replica.layout.layout import Layout
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.mirror import mirror as mirror_module
from tests.replica.world import MakeWorld, State, World

FROZEN = ("frozen", "frozen_small", "frozen_scattered")


def tuned(value: float) -> State:
    """A state of which nine tenths are frozen, including small and non-contiguous tensors."""
    return {
        "frozen": torch.ones(2700, 400),
        "frozen_small": torch.ones(100),
        "frozen_scattered": torch.ones(300, 400).T,
        "weight": torch.full((400, 300), float(value)),
        "mean": torch.full((9,), float(value)),
    }


def tuned_layout(ranks: int) -> Layout:
    state = tuned(0)
    shared = describe({name: t for name, t in state.items() if name != "mean"}, replicated=True)
    own = describe({"mean": state["mean"]}, replicated=False)
    return plan_layout([tuple(replace(d, static=d.name in FROZEN) for d in shared + own)] * ranks)


def train(world: World, states: list[State], steps: range, change: Callable[[int], None] = lambda _: None) -> None:
    """Mirror several versions, in which weight and mean equal the number of the step."""
    for step in steps:
        for state in states:
            state["weight"].fill_(step)
            state["mean"].fill_(step)
        change(step)
        for rank, state in enumerate(states):
            world.mirrors[rank].submit(Version(step, True), state, f"blob {rank} {step}".encode())
        assert world.settle() == [Version(step, True)] * len(states)


def test_the_static_part_comes_first_and_both_parts_are_balanced() -> None:
    layout = tuned_layout(4)
    for shard in range(4):
        flags = [chunk.static for chunk in layout.of(shard)]
        assert flags == sorted(flags, reverse=True)
    static = [layout.static_bytes(shard) for shard in range(4)]
    rest = [layout.bulk_bytes(shard) - layout.static_bytes(shard) for shard in range(4)]
    assert max(static) < 1.2 * min(static) and max(rest) < 1.2 * min(rest)
    assert Layout.from_bytes(layout.to_bytes(), layout.digest).digest == layout.digest


@pytest.mark.parametrize("staging", ["overlap", "blocking"])
@pytest.mark.parametrize("checksum", ["xxh3", "none"])
def test_frozen_bytes_are_sent_once(world: MakeWorld, checksum: str, staging: str) -> None:
    layout = tuned_layout(2)
    ranks = world(2).begin(layout=layout, checksum=checksum, staging=staging, verifies=False)
    states = [tuned(0) for _ in range(2)]
    train(ranks, states, range(1, 11))
    bulk, still = layout.bulk_bytes(0), layout.static_bytes(0)
    assert still > 0.88 * bulk
    blobs = sum(len(f"blob 0 {step}") for step in range(1, 11))
    assert ranks.mirrors[0].stats.sent_bytes == bulk + 9 * (bulk - still) + blobs
    staged = ranks.mirrors[0].stats.staged_bytes
    # Late tensors are compared in place; non-contiguous or small ones are copied anyway.
    assert staged == 10 * bulk if staging == "blocking" else staged < 2 * bulk + 8 * 0.25 * bulk


def test_frozen_private_bytes_are_sent_once_to_a_holder_that_fills_in_the_rest(world: MakeWorld) -> None:
    layout = plan_layout([
        (
            *describe({"frozen": tuned(0)["frozen"]}, replicated=True),
            *(replace(d, static=True) for d in describe({"mask": torch.ones(5000)}, replicated=False)),
            *describe({"mean": tuned(0)["mean"]}, replicated=False),
        )
    ] * 2)  # fmt: skip
    ranks = world(2).begin(layout=layout, slots=3)
    for arena in ranks.arenas:
        arena.write_layout(layout)
    states = [tuned(0) | {"mask": torch.full((5000,), float(rank + 20))} for rank in range(2)]
    train(ranks, states, range(1, 8))
    blobs = sum(len(f"blob 0 {step}") for step in range(1, 8))
    assert ranks.mirrors[0].stats.sent_bytes == states[0]["mask"].nbytes + 7 * states[0]["mean"].nbytes + blobs
    for lost in range(2):
        assert ranks.values(without=[lost]) == {1.0, 7.0, 20.0, 21.0}
    states[1]["mask"].fill_(22)
    train(ranks, states, range(8, 12))
    for lost in range(2):
        assert ranks.values(without=[lost]) == {1.0, 11.0, 20.0, 22.0}


def _in_place(tensor: torch.Tensor) -> None:
    tensor.view(-1)[3] = 7


def _through_data(tensor: torch.Tensor) -> None:
    before = tensor._version
    tensor.data.view(-1)[-1] = 7
    assert tensor._version == before


def _by_a_fused_optimizer(tensor: torch.Tensor) -> None:
    parameter = torch.nn.Parameter(tensor)
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad.view(-1)[5] = -6
    torch.optim.SGD([parameter], 1.0, fused=True).step()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("frozen", _in_place),
        ("frozen", _through_data),
        ("frozen", _by_a_fused_optimizer),
        ("frozen_small", _through_data),
        ("frozen_scattered", _through_data),
    ],
)
def test_a_frozen_tensor_that_changes_is_in_the_next_version(
    world: MakeWorld, name: str, write: Callable[[torch.Tensor], None]
) -> None:
    ranks = world(2).begin(layout=(layout := tuned_layout(2)))
    for arena in ranks.arenas:
        arena.write_layout(layout)
    states = [tuned(0) for _ in range(2)]

    def thaw(step: int) -> None:
        if step == 7:
            for state in states:
                write(state[name] if name != "frozen_scattered" else state[name].T)

    train(ranks, states, range(1, 7), thaw)
    assert ranks.values() == {1.0, 6.0}
    train(ranks, states, range(7, 9), thaw)
    for lost in range(2):
        assert ranks.values(without=[lost]) == {1.0, 7.0, 8.0}
    sent = ranks.mirrors[0].stats.sent_bytes
    train(ranks, states, range(9, 10))
    assert ranks.mirrors[0].stats.sent_bytes - sent < 0.2 * layout.bulk_bytes(0)


def test_a_torn_round_is_not_relied_on(world: MakeWorld) -> None:
    states = [tuned(0) for _ in range(2)]

    def write(moment: str, version: Version) -> None:
        if moment == "stage" and version.optimizer_step == 5:
            states[0]["frozen"].fill_(3)

    ranks = world(2).begin(layout=(layout := tuned_layout(2)), probes={0: write})
    for arena in ranks.arenas:
        arena.write_layout(layout)
    train(ranks, states, range(1, 5))
    states[0]["frozen"].fill_(2)
    states[1]["frozen"].fill_(3)
    for rank, state in enumerate(states):
        ranks.mirrors[rank].submit(Version(5, True), state, f"blob {rank} 5".encode())
    assert ranks.settle() == [Version(4, True)] * 2 and ranks.mirrors[0].stats.torn == 1
    assert ranks.values() == {1.0, 4.0}
    train(ranks, states, range(6, 8))
    for lost in range(2):
        assert ranks.values(without=[lost]) == {1.0, 3.0, 7.0}


def test_a_new_generation_assumes_no_known_prefix(world: MakeWorld) -> None:
    ranks = world(2).begin(layout=(layout := tuned_layout(2)), verifies=False)
    for arena in ranks.arenas:
        arena.write_layout(layout)
    states = [tuned(0) for _ in range(2)]
    train(ranks, states, range(1, 4))
    ranks.begin(layout=layout, committed=Version(3, True), verifies=False)
    for state in states:
        state["frozen"].fill_(4)
    train(ranks, states, range(4, 6))
    assert ranks.mirrors[0].stats.sent_bytes > layout.bulk_bytes(0)
    assert ranks.values() == {1.0, 4.0, 5.0}


def test_damage_to_the_static_part_is_detected_and_repaired(world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "REWRITE_ROUNDS", 3)
    ranks = world(2).begin(layout=(layout := tuned_layout(2)))
    for arena in ranks.arenas:
        arena.write_layout(layout)
    states = [tuned(0) for _ in range(2)]
    train(ranks, states, range(1, 4))
    kept = next(r for r in ranks.arenas[0].inventory() if r.shard == 1 and r.version.optimizer_step == 3)
    with (ranks.arenas[0].path / f"shard-0001.held-by-0000.{layout.digest[:12]}.slot-{kept.slot}").open("r+b") as file:
        file.seek(4096 + 100)
        file.write(b"damage")
    assert not ranks.arenas[0].verify(kept)
    train(ranks, states, range(4, 9))
    assert ranks.values() == {1.0, 8.0}


def test_a_holder_whose_ring_is_at_another_slot_copies_the_frozen_bytes_itself(world: MakeWorld) -> None:
    ranks = world(2).begin(layout=(layout := tuned_layout(2)), slots=4, verifies=False)
    for arena in ranks.arenas:
        arena.write_layout(layout)
    states = [tuned(0) for _ in range(2)]
    train(ranks, states, range(1, 6))
    for path in ranks.arenas[1].path.glob("shard-0000.*"):
        path.unlink()
    ranks.begin(layout=layout, committed=Version(5, True), slots=4, verifies=False)
    train(ranks, states, range(6, 12))
    blobs = sum(len(f"blob 0 {step}") for step in range(6, 12))
    still = layout.static_bytes(0)
    assert ranks.mirrors[0].stats.sent_bytes == 6 * (layout.bulk_bytes(0) - still) + still + blobs
    assert all(arena.verify(replica) for arena in ranks.arenas for replica in arena.inventory())


def test_a_holder_that_does_not_know_an_omitted_part_raises_an_error(world: MakeWorld) -> None:
    ranks = world(2).begin(layout=tuned_layout(2))
    states = [tuned(0) for _ in range(2)]
    train(ranks, states, range(1, 4))
    ranks.mirrors[1]._exchange._last.clear()
    for rank, state in enumerate(states):
        ranks.mirrors[rank].submit(Version(4, True), state, b"")
    with pytest.raises(TransportError, match="rank 0 omits"):
        ranks.mirrors[1].settle()
    ranks.transports[1].close()
    with pytest.raises(TransportError):
        ranks.mirrors[0].settle()


@pytest.mark.parametrize("parts", [(b"abcdef", b"gh"), (b"ab", b"cdefgh"), (b"abcd", b"efgh")])
def test_a_joined_digest_covers_all_bytes(parts: tuple[bytes, bytes]) -> None:
    checksum = joined(4, digest("xxh3", [b"abcd"]), digest("crc32", [b"efgh"]))
    assert matches(checksum, parts)
    assert not matches(checksum, (b"Xbcdef", b"gh")) and not matches(checksum, (b"abcdef", b"gX"))
    assert not matches("x=xxh3:00+" + digest("crc32", [b"efgh"]), parts)
