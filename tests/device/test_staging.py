"""Copies from the device: the values of the moment at which they were taken, in the right place, and no wait before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.layout import Layout, describe, plan_layout, slot_views
from lightning_ckptless.replica.slot import Slot, Stamp
from lightning_ckptless.replica.staging import Stager
from lightning_ckptless.trainer.late_packing import pack_late
from lightning_ckptless.trainer.plain import unpack

SIZE = 2048


def _tensors() -> dict[str, torch.Tensor]:
    made = {f"weight{n}": torch.randn(SIZE, SIZE, device="cuda") for n in range(3)}
    return made | {"step": torch.tensor(3.0), "mean": torch.randn(7, device="cuda"), "empty": torch.empty(0)}


def _keep_busy() -> torch.Tensor:
    """Some tenths of a second of work for the device."""
    product = torch.randn(4096, 4096, device="cuda")
    for _ in range(100):
        product = product @ product / product.norm()
    return product


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return _tensors()


@pytest.fixture
def layout(tensors: dict[str, torch.Tensor]) -> Layout:
    return plan_layout([describe(tensors, replicated=True)])


@pytest.fixture
def slot(layout: Layout, tmp_path: Path) -> Iterator[Slot]:
    made = Slot(tmp_path / "slot", "run", layout.bulk_bytes(0))
    made.begin(Stamp(Version(1, True), 1, 1, layout.digest, 0, 0))
    yield made
    made.close()


def _held(layout: Layout, slot: Slot) -> list[torch.Tensor]:
    return [view.clone() for view in slot_views(layout, 0, slot.bulk)]


def test_every_byte_arrives(tensors: dict[str, torch.Tensor], layout: Layout, slot: Slot) -> None:
    stager, halves = Stager(layout, 0), []
    stager.finish(stager.take(slot.bulk, tensors, ()), lambda: halves.append(1))
    expected = [tensors[chunk.name].cpu() for chunk in layout.of(0)]
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(_held(layout, slot), expected, strict=True))
    assert halves == [1]
    stager.close()


def test_values_are_those_behind_the_work_that_was_queued(
    tensors: dict[str, torch.Tensor], layout: Layout, slot: Slot
) -> None:
    stager = Stager(layout, 0)
    busy = _keep_busy()
    tensors["weight0"].copy_(busy[:SIZE, :SIZE])
    load = stager.take(slot.bulk, tensors, ())
    assert not torch.cuda.current_stream().query(), "taking has waited for the device"
    stager.finish(load)
    places = [chunk.name for chunk in layout.of(0)]
    held = _held(layout, slot)[places.index("weight0")]
    assert torch.equal(held.flatten(), busy[:SIZE, :SIZE].flatten().cpu())
    stager.close()


def test_what_is_copied_early_may_change_at_once(tensors: dict[str, torch.Tensor], layout: Layout, slot: Slot) -> None:
    stager = Stager(layout, 0)
    before = tensors["mean"].cpu()
    load = stager.take(slot.bulk, tensors, ("mean",))
    tensors["mean"].zero_()
    stager.finish(load)
    places = [chunk.name for chunk in layout.of(0)]
    assert torch.equal(_held(layout, slot)[places.index("mean")].flatten(), before)
    assert load.changed() is None
    stager.close()


def test_a_write_to_a_late_tensor_is_noticed(tensors: dict[str, torch.Tensor], layout: Layout, slot: Slot) -> None:
    stager = Stager(layout, 0)
    load = stager.take(slot.bulk, tensors, ())
    tensors["weight1"].add_(1)
    stager.finish(load)
    assert load.changed() == "weight1"
    stager.close()


def test_a_slot_can_be_mapped_and_registered_again(
    tensors: dict[str, torch.Tensor], layout: Layout, tmp_path: Path
) -> None:
    for _ in range(3):
        slot = Slot(tmp_path / "again", "run", layout.bulk_bytes(0))
        slot.begin(Stamp(Version(1, True), 1, 1, layout.digest, 0, 0))
        stager = Stager(layout, 0)
        stager.finish(stager.take(slot.bulk, tensors, ()))
        assert torch.equal(_held(layout, slot)[0].flatten(), tensors[layout.of(0)[0].name].flatten().cpu())
        stager.close()
        slot.close()


def test_small_state_is_packed_without_a_wait() -> None:
    busy = _keep_busy()
    state = {"mean": busy.mean(), "count": torch.tensor(3), "nested": [{"last": busy[0, :5]}], "text": "x"}
    late = pack_late(state)
    assert not torch.cuda.current_stream().query(), "packing has waited for the device"
    assert callable(late)
    expected = {"mean": state["mean"].clone(), "last": busy[0, :5].clone()}  # type: ignore[attr-defined]
    busy.zero_()
    found = unpack(late())
    assert found["mean"].is_cuda
    assert torch.equal(found["mean"], expected["mean"])
    assert torch.equal(found["nested"][0]["last"], expected["last"])
    assert (int(found["count"]), found["text"]) == (3, "x")
