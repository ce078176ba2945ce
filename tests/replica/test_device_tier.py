"""The device tier among ranks that are threads: what is delivered, saved, offered, and restored after a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from lightning_ckptless.errors import OptionsError, TransportError
from lightning_ckptless.protocol.device_tier import kept_on_devices, needed_with, place_on_devices
from lightning_ckptless.protocol.placement import place
from lightning_ckptless.protocol.versions import Complete, Replica, Snapshot, Tier, Version
from lightning_ckptless.replica.arena import Arena, Owner
from lightning_ckptless.replica.device_tier.delivery import Delivery
from lightning_ckptless.replica.device_tier.device_plan import DevicePlan
from lightning_ckptless.replica.device_tier.device_space import DeviceNeed, free_bytes_of, require_fits
from lightning_ckptless.replica.device_tier.device_tier import DeviceTier
from lightning_ckptless.replica.layout.layout import live_views, slot_views
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.restore import Fetched, choose, fetch, fill
from lightning_ckptless.replica.slot_stamp import Stamp
from lightning_ckptless.replica.transport import LoopbackTransport

T = TypeVar("T")
State = dict[str, torch.Tensor]


def state_at(rank: int, step: int) -> State:
    """Replicated weights, a parameter that a hook writes to, and a buffer that differs between ranks."""
    return {
        "weight": torch.full((40, 10), float(step)),
        "average": torch.full((30,), step + 0.5),
        "mean": torch.full((9,), 100.0 * rank + step),
    }


class Ranks:
    """Ranks on one node, each with a device tier; the arena is empty unless a test fills it."""

    def __init__(self, tmp_path: Path, owner: Owner, size: int) -> None:
        self.size = size
        self.nodes = ["node"] * size
        self.arena = Arena.create(tmp_path, "run", "node", owner)
        described = [
            describe({n: t for n, t in state_at(0, 0).items() if n != "mean"}, replicated=True)
            + describe({"mean": state_at(0, 0)["mean"]}, replicated=False)
        ] * size
        self.layout = plan_layout(described)
        self.arena.write_layout(self.layout)
        self.placement = place_on_devices(place(self.nodes, 1), 1)
        self.tiers = [DeviceTier() for _ in range(size)]
        self.live = [state_at(rank, 0) for rank in range(size)]
        self.generation = 0
        self.known: list[tuple[int, int]] = []
        self.regroup()

    def regroup(self) -> None:
        self.generation += 1
        self.transports = LoopbackTransport.world(self.size, timeout_s=20.0)

    def run(self, function: Callable[[int], T]) -> list[T]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(function, range(self.size)))

    def plan(self, rank: int) -> DevicePlan:
        shards = kept_on_devices(self.placement)[rank]
        return DevicePlan(self.layout, rank, shards, frozenset({"average"}), frozenset(), torch.device("cpu"))

    def step(self, rank: int, step: int) -> Delivery:
        """End a step; returns its round, which is still to be run."""
        for name, tensor in state_at(rank, step).items():
            self.live[rank][name].copy_(tensor)
        snapshot = Snapshot(Version(step, True), self.generation, self.size, self.layout.digest)
        blob = f"host state of {rank} at {step}".encode()
        live = self.tiers[rank].take(snapshot, self.plan(rank), self.live[rank], lambda: blob)
        # What a forward pass and a hook of the next batch do.
        self.live[rank]["mean"].add_(1000.0)
        self.live[rank]["average"].add_(1000.0)
        return Delivery(
            live, self.transports[rank], self.placement.holders[rank], lambda: self.known.append((rank, step))
        )

    def steps(self, *steps: int) -> None:
        """Make whole steps on all ranks; the last one is saved as well."""
        for step in steps:
            rounds = [self.step(rank, step) for rank in range(self.size)]
            self.run(lambda rank, rounds=rounds: rounds[rank].run())  # type: ignore[misc]
            self.run(lambda rank: self.tiers[rank].save())

    def mirror(self, rank: int, step: int) -> None:
        """Put a rank's own shard into the arena."""
        shard_bytes = self.layout.bulk_bytes(rank)
        ring = self.arena.slots(rank, rank, shard_bytes, layout=self.layout.digest)
        stamp = Stamp(Version(step, True), self.generation, self.size, self.layout.digest, rank, rank)
        ring[0].begin(stamp)
        live = live_views(self.layout, rank, rank, state_at(rank, step))
        for target, source in zip(slot_views(self.layout, rank, ring[0].bulk), live, strict=True):
            target.copy_(source)
        ring[0].seal(stamp, f"host state of {rank} at {step}".encode(), "")
        ring[0].commit()
        for slot in ring:
            slot.close()

    def lose(self, *ranks: int) -> None:
        """Replace the ranks by new processes, and regroup."""
        for rank in ranks:
            self.tiers[rank] = DeviceTier()
            self.live[rank] = state_at(rank, 0)
        self.regroup()

    def chosen(self) -> Complete:
        found = self.run(self._choose)
        assert len({each.snapshot for each in found}) == 1
        return found[0]

    def _choose(self, rank: int) -> Complete:
        transport = self.transports[rank]
        mine = self.tiers[rank].offer(transport, self.nodes)
        found = choose(self.arena, transport, self.nodes, device=mine)
        assert isinstance(found, Complete), found
        return found

    def offered(self, rank: int) -> tuple[Replica, ...]:
        return self.tiers[rank].inventory(rank, self.size, self.nodes[rank])

    def restore(self) -> list[Fetched]:
        found, kept = self.chosen(), kept_on_devices(self.placement)

        def restored(rank: int) -> Fetched:
            tier = self.tiers[rank]
            tier.settle(found.snapshot)
            need = needed_with(self.layout.need, kept)
            transport = self.transports[rank]
            fetched = fetch(found, self.arena, transport, self.nodes, need=need, blobs=kept, device=tier)
            bulks = {shard: fetched.bulks[shard] for shard in kept[rank]}
            tier.hold(found.snapshot, rank, bulks, fetched.blobs)
            fill(self.layout, fetched.bulks, self.live[rank], rank)
            return fetched

        return self.run(restored)

    def assert_restored(self, step: int) -> None:
        for rank, fetched in enumerate(self.restore()):
            assert fetched.blobs[rank] == f"host state of {rank} at {step}".encode()
            assert fetched.received == frozenset()
            assert fetched.sources["device tier"] == len(fetched.bulks)
            for name, expected in state_at(rank, step).items():
                assert torch.equal(self.live[rank][name], expected), (rank, name)


@pytest.fixture(params=[2, 4, 5])
def ranks(request: pytest.FixtureRequest, tmp_path: Path, owner: Owner) -> Iterator[Ranks]:
    made = Ranks(tmp_path, owner, request.param)
    yield made
    made.arena.close()


def test_a_saved_version_is_restored_without_an_arena(ranks: Ranks) -> None:
    ranks.steps(1, 2)
    assert sorted(ranks.known) == [(rank, step) for rank in range(ranks.size) for step in (1, 2)]
    for tensors in ranks.live:
        # The next step has begun.
        tensors["weight"].fill_(-1.0)
    ranks.lose(1)
    ranks.assert_restored(2)


def test_live_tensors_take_the_place_of_slots_that_were_not_overwritten_yet(ranks: Ranks) -> None:
    ranks.steps(1)
    rounds = [ranks.step(rank, 2) for rank in range(ranks.size)]
    ranks.run(lambda rank: rounds[rank].run())
    ranks.tiers[0].save()
    ranks.live[0]["weight"].fill_(-1.0)
    ranks.lose(1)
    ranks.assert_restored(2)


def test_a_version_that_no_survivor_knows_is_passed_over(ranks: Ranks) -> None:
    ranks.steps(1)
    rounds = [ranks.step(rank, 2) for rank in range(ranks.size)]
    ranks.transports[1].close()
    for rank in range(ranks.size):
        if rank != 1:
            with pytest.raises(TransportError):
                rounds[rank].run()
    ranks.lose(1)
    ranks.assert_restored(1)


def test_what_was_restored_survives_the_next_loss_at_once(ranks: Ranks) -> None:
    ranks.steps(1, 2)
    ranks.lose(1)
    ranks.assert_restored(2)
    ranks.lose(0)
    ranks.assert_restored(2)
    ranks.steps(3)
    ranks.lose(ranks.size - 1)
    ranks.assert_restored(3)


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_the_arenas_are_left_if_all_holders_of_a_shard_are_lost(ranks: Ranks) -> None:
    ranks.steps(1)
    for rank in range(4):
        ranks.mirror(rank, 1)
    ranks.steps(2)
    ranks.lose(0)
    assert ranks.chosen().snapshot.version == Version(2, True)
    ranks.lose(0, 1)
    for rank, fetched in enumerate(ranks.restore()):
        assert fetched.blobs[rank] == f"host state of {rank} at 1".encode()
        assert fetched.sources == {"own arena": len(fetched.bulks), "peer": 0, "device tier": 0}
        assert torch.equal(ranks.live[rank]["weight"], state_at(rank, 1)["weight"])
    # Device memory has the restored version as well from now on.
    ranks.arena.clear()
    ranks.arena.write_layout(ranks.layout)
    ranks.lose(2)
    ranks.assert_restored(1)


def test_an_error_of_the_round_is_raised_before_the_tensors_change(ranks: Ranks) -> None:
    round_ = ranks.step(0, 1)
    round_.fail(TransportError("lost"))
    with pytest.raises(TransportError, match="lost"):
        ranks.tiers[0].save()


def test_a_tensor_that_changed_too_early_is_not_saved(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    ranks.steps(1)
    rounds = [ranks.step(rank, 2) for rank in range(ranks.size)]
    ranks.run(lambda rank: rounds[rank].run())
    ranks.live[0]["weight"].add_(1.0)
    assert {replica.version.optimizer_step for replica in ranks.offered(0)} == {1}
    ranks.tiers[0].save()
    assert {replica.version.optimizer_step for replica in ranks.offered(0)} == {1}
    assert "rank 0: weight changed between step 2 and the next optimizer step" in caplog.text


def test_nothing_is_offered_under_another_rank_or_world_size(ranks: Ranks) -> None:
    ranks.steps(1)
    assert {replica.tier for replica in ranks.offered(0)} == {Tier.DEVICE}
    assert ranks.tiers[0].inventory(0, ranks.size + 1, "node") == ()
    assert ranks.offered(0) == ()
    assert ranks.tiers[1].inventory(0, ranks.size, "node") == ()


def test_the_arenas_are_left_if_one_rank_knows_of_a_difference(ranks: Ranks) -> None:
    ranks.steps(1)
    for rank in range(ranks.size):
        ranks.mirror(rank, 1)
    ranks.steps(2)
    ranks.tiers[0].distrust()
    # Also if another rank is lost before all have chosen a version.
    ranks.tiers[0].drop()
    ranks.lose(1)
    for fetched in ranks.restore():
        assert fetched.sources == {"own arena": len(fetched.bulks), "peer": 0, "device tier": 0}
    ranks.steps(2)
    ranks.lose(1)
    ranks.assert_restored(2)


def test_slots_are_reused_while_they_fit(ranks: Ranks) -> None:
    ranks.steps(1)
    before = ranks.tiers[0]._saved
    ranks.steps(2)
    after = ranks.tiers[0]._saved
    assert before is not None and after is not None and after.slots is before.slots


def test_a_tier_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    slots = DeviceNeed("device_tier='on'", "device_tier='off'", "the slots", 50_000_000, 2)
    require_fits([slots], 100_000_000, 4, 3.0, 350_000_000, 0)
    with pytest.raises(OptionsError) as caught:
        require_fits([slots], 100_000_000, 4, 3.0, 349_000_000, 0)
    assert str(caught.value) == (
        "rank 0: device_tier='on' does not fit: 2/4 of the state = 150.0 MB for the slots, and 200.0 MB for the "
        "optimizers, but 349.0 MB of device memory are free: keep fewer copies, free memory, or set device_tier='off'"
    )
    assert free_bytes_of(torch.device("cpu"), 2) > 0


def test_slots_and_buffers_have_to_fit_together() -> None:
    needs = [
        DeviceNeed("device_tier='on'", "device_tier='off'", "the slots", 50_000_000, 2),
        DeviceNeed("staging='device'", "staging='overlap'", "the buffers", 25_000_000, 1),
    ]
    require_fits(needs, 100_000_000, 4, 1.0, 75_000_000, 0)
    with pytest.raises(OptionsError) as caught:
        require_fits(needs, 100_000_000, 4, 1.0, 74_000_000, 1)
    assert str(caught.value) == (
        "rank 1: device_tier='on' and staging='device' do not fit: 2/4 of the state = 50.0 MB for the slots, 1/4 of "
        "the state = 25.0 MB for the buffers, and 0 bytes for the optimizers, but 74.0 MB of device memory are free: "
        "keep fewer copies, free memory, or set device_tier='off' or staging='overlap'"
    )
