"""The plan of a restore: every rank gets every needed shard once, from its own node if possible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.transfers import Part, Read, Send, Transfer, TransferPlan, plan_copies
from lightning_ckptless.protocol.versions import Complete, Replica, SlotState, Snapshot, Tier, Version

VERSION = Version(7, True)
World = tuple[Complete, list[str], dict[int, set[int]]]


def replica(
    shard: int, holder: int, node: str, world_size: int, bulk_bytes: int = 100, tier: Tier = Tier.HOST
) -> Replica:
    return Replica(
        shard, holder, node, 0, VERSION, 1, world_size, "layout", SlotState.COMMITTED, bulk_bytes, 10 + shard, "", tier
    )


def complete(replicas: list[list[Replica]]) -> Complete:
    return Complete(Snapshot(VERSION, 1, len(replicas), "layout"), tuple(tuple(kept) for kept in replicas), "found")


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Ranks on nodes, replicas in the arena or the device memory of any of the ranks, and any need."""
    size = draw(st.integers(1, 6))
    ranks = st.integers(0, size - 1)
    nodes = [draw(st.sampled_from("abc")) for _ in range(size)]
    kept = []
    for shard in range(size):
        bulk_bytes = draw(st.integers(0, 1000))
        holders = draw(st.sets(ranks, min_size=1))
        kept.append([
            replica(shard, holder, nodes[holder], size, bulk_bytes, draw(st.sampled_from(Tier)))
            for holder in sorted(holders)
        ])  # fmt: skip
    need = draw(st.dictionaries(ranks, st.sets(ranks)))
    return complete(kept), nodes, need


def transfers(plan: TransferPlan, world_size: int) -> list[Transfer]:
    """Everything that the ranks read and receive."""
    steps: list[Transfer] = []
    for rank in range(world_size):
        steps += plan.reads(rank)
        steps += plan.receives(rank)
    return steps


@given(worlds())
def test_every_rank_gets_every_needed_part_exactly_once(world: World) -> None:
    found, nodes, need = world
    plan = transfers(TransferPlan(found, nodes, need), len(nodes))
    got = Counter((_receiver(t), t.replica.shard, part) for t in plan for part in _parts(t.part))
    bulks = {(rank, shard, Part.BULK) for rank, shards in need.items() for shard in shards}
    blobs = {(rank, rank, Part.BLOB) for rank in need}
    assert got == Counter(bulks | blobs)


@given(worlds())
def test_local_replicas_are_read_and_senders_have_what_they_send(world: World) -> None:
    found, nodes, need = world
    for transfer in transfers(TransferPlan(found, nodes, need), len(nodes)):
        assert transfer.replica in found.replicas[transfer.replica.shard]
        if isinstance(transfer, Read):
            assert transfer.replica.is_readable_by(transfer.rank, nodes[transfer.rank])
        else:
            source, target = transfer.source_rank, transfer.target_rank
            assert transfer.shard == transfer.replica.shard
            assert transfer.replica.is_readable_by(source, nodes[source])
            assert not any(r.is_readable_by(target, nodes[target]) for r in found.replicas[transfer.shard])


@given(worlds())
def test_ranks_that_plan_on_their_own_agree(world: World) -> None:
    """What the ranks send is what the ranks receive, and each node knows what is used of its arena."""
    found, nodes, need = world
    plan, ranks = TransferPlan(found, nodes, need), range(len(nodes))
    sent = [step for rank in ranks for step in plan.sends(rank)]
    assert all(step.source_rank == rank for rank in ranks for step in plan.sends(rank))
    assert Counter(sent) == Counter(step for rank in ranks for step in plan.receives(rank))
    used = set().union(*(plan.used_on(node) for node in set(nodes)))
    assert used == {step.replica for step in transfers(plan, len(nodes)) if step.replica.tier is Tier.HOST}


@given(worlds())
def test_the_plan_does_not_depend_on_the_order_of_the_need(world: World) -> None:
    found, nodes, need = world
    backwards = TransferPlan(found, nodes, dict(reversed(need.items())))
    assert transfers(TransferPlan(found, nodes, need), len(nodes)) == transfers(backwards, len(nodes))


def test_senders_share_the_work() -> None:
    """The ranks of a node that has all shards share the work of sending to a node that lost all."""
    kept = [[replica(shard, shard % 4, "a", 8)] for shard in range(8)]
    nodes = ["a"] * 4 + ["b"] * 4
    plan = TransferPlan(complete(kept), nodes, {rank: set(range(8)) for rank in range(8)})
    sent = [sum(step.sent_bytes for step in plan.sends(rank)) for rank in range(8)]
    assert sum(sent) == 4 * 8 * 100 + sum(10 + shard for shard in range(4, 8))
    assert all(sent[rank] == 0 for rank in range(4, 8))
    assert max(sent) - min(sent[:4]) <= 117


@pytest.mark.parametrize("need", [{9: range(16)}, {rank: [rank] for rank in range(8, 16)}])
def test_one_receiver_and_one_shard_each_are_shared_too(need: dict[int, Sequence[int]]) -> None:
    """No sender sends more than twice its part, if one rank of a node needs every shard or every rank its own."""
    kept = [[replica(shard, shard % 8, "a", 16)] for shard in range(16)]
    plan = TransferPlan(complete(kept), ["a"] * 8 + ["b"] * 8, need, {})
    sent = [len(plan.sends(rank)) for rank in range(8)]
    wanted = sum(map(len, need.values()))
    assert sum(sent) == wanted
    assert max(sent) <= 2 * wanted / 8


def test_a_large_world_is_planned_by_each_rank_alone() -> None:
    """A plan of all ranks would have sixteen million transfers."""
    ranks, nodes = range(4096), [f"node{rank // 8}" for rank in range(4096)]
    kept = [[replica(s, h, nodes[h], 4096) for h in (s, (s + 8) % 4096)] for s in ranks]
    plan = TransferPlan(complete(kept), nodes, dict.fromkeys(ranks, ranks))
    assert len(plan.reads(17)) + len(plan.receives(17)) == 4096
    assert len(plan.used_on("node2")) == 16


def test_a_rank_prefers_the_copy_that_it_keeps_itself() -> None:
    found = complete([[replica(0, 0, "a", 2), replica(0, 1, "a", 2)], [replica(1, 1, "a", 2)]])
    plan = TransferPlan(found, ["a", "a"], {1: {0, 1}})
    assert plan.reads(1) == [Read(1, found.replicas[0][1], Part.BULK), Read(1, found.replicas[1][0], Part.WHOLE)]


def test_only_the_holder_sends_what_is_in_its_device_memory() -> None:
    found = complete([[replica(0, 0, "a", 2, tier=Tier.DEVICE)], [replica(1, 0, "a", 2)]])
    plan = TransferPlan(found, ["a", "a"], {1: {0, 1}})
    assert plan.reads(1) == [Read(1, found.replicas[1][0], Part.WHOLE)]
    assert plan.sends(0) == plan.receives(1) == [Send(0, 1, 0, found.replicas[0][0], Part.BULK)]
    assert plan.sends(1) == [] and plan.used_on("a") == {found.replicas[1][0]}


def test_the_host_state_is_transferred_even_if_the_tensors_are_not_needed() -> None:
    found = complete([[replica(0, 0, "a", 2)], [replica(1, 0, "a", 2)]])
    plan = TransferPlan(found, ["a", "b"], {1: {0}})
    assert plan.receives(1) == [
        Send(0, 1, 0, found.replicas[0][0], Part.BULK),
        Send(0, 1, 1, found.replicas[1][0], Part.BLOB),
    ]
    assert [step.sent_bytes for step in plan.receives(1)] == [100, 11]


@given(worlds())
def test_every_absent_copy_is_filled_in_once_and_completely(world: World) -> None:
    found, nodes, need = world
    absent = [(shard, rank) for rank, shards in need.items() for shard in shards]
    plan = plan_copies(found, nodes, absent)
    assert Counter((t.replica.shard, _receiver(t)) for t in plan) == Counter(absent)
    for transfer in plan:
        receiver = _receiver(transfer)
        near = any(r.is_readable_by(receiver, nodes[receiver]) for r in found.replicas[transfer.replica.shard])
        assert isinstance(transfer, Read) == near and transfer.part is Part.WHOLE


def _receiver(transfer: Read | Send) -> int:
    return transfer.rank if isinstance(transfer, Read) else transfer.target_rank


def _parts(part: Part) -> tuple[Part, ...]:
    return (Part.BULK, Part.BLOB) if part is Part.WHOLE else (part,)
