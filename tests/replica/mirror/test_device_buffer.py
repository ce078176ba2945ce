"""Copies through a buffer in device memory, which on CPU ranks is in the memory of the process."""

from __future__ import annotations

import threading

import pytest
import torch

from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.layout.layout import aligned, pieces_for, slot_views
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.mirror.device_buffer import DeviceBuffer, buffer_need, joined_spans
from lightning_ckptless.replica.mirror.staging import Stager
from tests.replica.world import MakeWorld, wait_for


@pytest.mark.parametrize("verifies", [True, False])
def test_tensors_may_change_while_the_copy_into_the_slot_has_not_begun(world: MakeWorld, verifies: bool) -> None:
    gate = threading.Event()
    ranks = world(2).begin(probes=dict.fromkeys(range(2), wait_for(gate)), staging="device", verifies=verifies)
    states = [ranks.tensors(1) for _ in range(2)]
    for rank, state in enumerate(states):
        mirror = ranks.mirrors[rank]
        mirror.submit(Version(1, True), state, f"blob {rank} 1".encode())
        mirror.wait_staged()
        assert mirror.busy and mirror._submitted is not None
        assert not any(copy.slot.bulk.any() for copy in mirror._submitted.copies), "copied directly into the slot"
        for tensor in state.values():
            tensor.fill_(99)
    gate.set()
    assert ranks.settle() == [Version(1, True)] * 2 and ranks.values() == {1.0}
    assert [mirror.stats.torn for mirror in ranks.mirrors] == [0, 0]


def test_every_version_is_what_the_tensors_contained(world: MakeWorld) -> None:
    ranks = world(3, copies=2).begin(staging="device")
    for step in range(1, 6):
        ranks.submit(step)
        assert ranks.settle() == [Version(step, True)] * 3 and ranks.values() == {float(step)}


@pytest.mark.parametrize("buffered", [True, False])
def test_strides_that_have_changed_are_seen_before_an_early_copy(buffered: bool) -> None:
    tensors = {"weight": torch.arange(16.0).reshape(4, 4)}
    layout = plan_layout([describe(tensors, replicated=True)])
    stager, bulk = Stager(layout, 0, buffered=buffered), torch.zeros(layout.bulk_bytes(0), dtype=torch.uint8)
    stager.finish(stager.take(bulk, tensors, tensors.keys()))
    # At the same address: only the strides tell.
    tensors["weight"].data = tensors["weight"].data.t()
    pending = stager.take(bulk, tensors, tensors.keys())
    expected = tensors["weight"].clone()
    tensors["weight"].data = torch.empty(0)
    stager.finish(pending)
    assert pending.changed() is None
    (view,) = slot_views(layout, 0, bulk)
    assert torch.equal(view.reshape(4, 4), expected)


def test_one_buffer_serves_both_slots() -> None:
    tensors = {"weight": torch.arange(100.0), "bias": torch.ones(3)}
    layout = plan_layout([describe(tensors, replicated=True)])
    stager = Stager(layout, 0, buffered=True)
    slots = [torch.zeros(layout.bulk_bytes(0), dtype=torch.uint8) for _ in range(2)]
    taken = [stager.take(bulk, tensors, tensors.keys()) for bulk in slots]
    assert len({source.data_ptr() for pending in taken for _, source in pending.added}) == 1
    for bulk, pending in zip(slots, taken, strict=True):
        assert not bulk.any()
        stager.finish(pending)
        for chunk, view in zip(layout.of(0), slot_views(layout, 0, bulk), strict=True):
            assert torch.equal(view.flatten(), tensors[chunk.name])


def test_pieces_of_other_ranks_are_not_overwritten() -> None:
    shared = describe({"a": torch.ones(16), "c": torch.ones(16)}, replicated=True)
    own = [describe({"b": torch.ones(16) * rank}, replicated=False) for rank in range(2)]
    layout = plan_layout([shared + own[0], shared + own[1]])
    for shard in range(2):
        held = pieces_for(layout, shard, 0)
        lacked = [chunk for chunk in layout.of(shard) if chunk not in held]
        buffer = DeviceBuffer(held, torch.device("cpu"))
        bulk = torch.full((layout.bulk_bytes(shard),), 7, dtype=torch.uint8)
        for target, source in buffer.copies_into(bulk):
            target.copy_(source)
        for chunk in lacked:
            assert (bulk[chunk.at : chunk.at + chunk.nbytes] == 7).all()
        assert sum(chunk.nbytes for chunk in held) <= int((bulk == 0).sum())
    assert any(not chunk.is_held_by(0) for chunk in layout.of(1))


def test_pieces_that_follow_each_other_are_one_copy() -> None:
    tensors = {f"weight{n}": torch.ones(n + 1) for n in range(9)}
    layout = plan_layout([describe(tensors, replicated=True)])
    chunks = layout.of(0)
    assert joined_spans(chunks) == [(slice(0, layout.bulk_bytes(0)), [*chunks])]
    first, second = [*chunks[:3]], [*chunks[4:]]
    parts = [(slice(0, chunks[3].at), first), (slice(chunks[4].at, layout.bulk_bytes(0)), second)]
    assert joined_spans(first + second) == parts


def test_there_is_memory_for_held_pieces_only() -> None:
    shared = describe({"a": torch.ones(64), "empty": torch.ones(0)}, replicated=True)
    layout = plan_layout([shared + describe({"b": torch.ones(1000)}, replicated=False) for _ in range(2)])
    own, other = (buffer_need(layout, 0, sources).used_bytes for sources in ((), (1,)))
    assert own == layout.bulk_bytes(0) and other - own == layout.bulk_bytes(1) - aligned(1000 * 4)
    buffer = DeviceBuffer(pieces_for(layout, 1, 0), torch.device("cpu"))
    assert (
        sum(source.nbytes for _, source in buffer.copies_into(torch.zeros(layout.bulk_bytes(1), dtype=torch.uint8)))
        == other - own
    )
