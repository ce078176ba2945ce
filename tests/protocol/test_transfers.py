"""The plan of a restore: every rank gets every needed shard once, from its own node if possible."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.protocol.transfers import Part, Read, Send, plan_copies, plan_transfers
from lightning_ckptless.protocol.versions import Complete, Replica, SlotState, Snapshot, Version

VERSION = Version(7, True)
World = tuple[Complete, list[str], dict[int, set[int]]]


def replica(shard: int, holder: int, node: str, world_size: int, bulk_bytes: int = 100) -> Replica:
    return Replica(
        shard, holder, node, 0, VERSION, 1, world_size, "layout", SlotState.COMMITTED, bulk_bytes, 10 + shard, ""
    )


def complete(replicas: list[list[Replica]]) -> Complete:
    return Complete(Snapshot(VERSION, 1, len(replicas), "layout"), tuple(tuple(kept) for kept in replicas), "found")


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Ranks on nodes, replicas at any of the ranks, and any need."""
    size = draw(st.integers(1, 6))
    ranks = st.integers(0, size - 1)
    nodes = [draw(st.sampled_from("abc")) for _ in range(size)]
    kept = []
    for shard in range(size):
        bulk_bytes = draw(st.integers(0, 1000))
        holders = draw(st.sets(ranks, min_size=1))
        kept.append([replica(shard, holder, nodes[holder], size, bulk_bytes) for holder in sorted(holders)])
    need = draw(st.dictionaries(ranks, st.sets(ranks)))
    return complete(kept), nodes, need


@given(worlds())
def test_every_rank_gets_every_needed_part_exactly_once(world: World) -> None:
    found, nodes, need = world
    plan = plan_transfers(found, nodes, need)
    got = Counter((_receiver(t), t.replica.shard, part) for t in plan for part in _parts(t.part))
    bulks = {(rank, shard, Part.BULK) for rank, shards in need.items() for shard in shards}
    blobs = {(rank, rank, Part.BLOB) for rank in need}
    assert got == Counter(bulks | blobs)


@given(worlds())
def test_local_replicas_are_read_and_senders_have_what_they_send(world: World) -> None:
    found, nodes, need = world
    for transfer in plan_transfers(found, nodes, need):
        assert transfer.replica in found.replicas[transfer.replica.shard]
        if isinstance(transfer, Read):
            assert transfer.replica.node == nodes[transfer.rank]
        else:
            assert transfer.shard == transfer.replica.shard
            assert transfer.replica.node == nodes[transfer.source_rank]
            assert nodes[transfer.target_rank] not in {r.node for r in found.replicas[transfer.shard]}


@given(worlds())
def test_the_plan_does_not_depend_on_the_order_of_the_need(world: World) -> None:
    found, nodes, need = world
    backwards = dict(reversed(need.items()))
    assert plan_transfers(found, nodes, need) == plan_transfers(found, nodes, backwards)


def test_senders_share_the_work() -> None:
    """The ranks of a node that has all shards share the work of sending to a node that lost all."""
    kept = [[replica(shard, shard % 4, "a", 8)] for shard in range(8)]
    nodes = ["a"] * 4 + ["b"] * 4
    plan = plan_transfers(complete(kept), nodes, {rank: set(range(8)) for rank in range(8)})
    sent = Counter(dict.fromkeys(range(8), 0))
    for transfer in plan:
        if isinstance(transfer, Send):
            sent[transfer.source_rank] += transfer.sent_bytes
    assert sum(sent.values()) == 4 * 8 * 100 + sum(10 + shard for shard in range(4, 8))
    assert all(sent[rank] == 0 for rank in range(4, 8))
    assert max(sent.values()) - min(sent[rank] for rank in range(4)) <= 117


def test_a_rank_prefers_the_copy_that_it_keeps_itself() -> None:
    found = complete([[replica(0, 0, "a", 2), replica(0, 1, "a", 2)], [replica(1, 1, "a", 2)]])
    plan = plan_transfers(found, ["a", "a"], {1: {0, 1}})
    assert plan == (Read(1, found.replicas[1][0], Part.WHOLE), Read(1, found.replicas[0][1], Part.BULK))


def test_the_host_state_is_transferred_even_if_the_tensors_are_not_needed() -> None:
    found = complete([[replica(0, 0, "a", 2)], [replica(1, 0, "a", 2)]])
    plan = plan_transfers(found, ["a", "b"], {1: {0}})
    assert plan == (
        Send(0, 1, 0, found.replicas[0][0], Part.BULK),
        Send(0, 1, 1, found.replicas[1][0], Part.BLOB),
    )
    assert [t.sent_bytes for t in plan if isinstance(t, Send)] == [100, 11]


@given(worlds())
def test_every_absent_copy_is_filled_in_once_and_completely(world: World) -> None:
    found, nodes, need = world
    absent = [(shard, rank) for rank, shards in need.items() for shard in shards]
    plan = plan_copies(found, nodes, absent)
    assert Counter((t.replica.shard, _receiver(t)) for t in plan) == Counter(absent)
    for transfer in plan:
        near = nodes[_receiver(transfer)] in {r.node for r in found.replicas[transfer.replica.shard]}
        assert isinstance(transfer, Read) == near and transfer.part is Part.WHOLE


def _receiver(transfer: Read | Send) -> int:
    return transfer.rank if isinstance(transfer, Read) else transfer.target_rank


def _parts(part: Part) -> tuple[Part, ...]:
    return (Part.BULK, Part.BLOB) if part is Part.WHOLE else (part,)
