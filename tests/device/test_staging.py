"""Copies from the device: values as of the capture, at the right place in the slot, without blocking on the device."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_ckptless.formats.packing import unpack
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.replica.arena_space import default_arena_dir
from lightning_ckptless.replica.layout.layout import Layout, live_views, slot_views
from lightning_ckptless.replica.layout.planner import plan_layout
from lightning_ckptless.replica.layout.tensor_spec import describe
from lightning_ckptless.replica.mirror.staging import Stager
from lightning_ckptless.replica.slot import Slot
from lightning_ckptless.replica.slot_stamp import Stamp
from lightning_ckptless.trainer.state.device_pickle import pack_late

SIZE = 2048


def _tensors() -> dict[str, torch.Tensor]:
    weights = {f"weight{n}": torch.randn(SIZE, SIZE, device="cuda") for n in range(3)}
    return weights | {"step": torch.tensor(3.0), "mean": torch.randn(7, device="cuda"), "empty": torch.empty(0)}


def _keep_busy() -> torch.Tensor:
    """Queue some tenths of a second of work on the device."""
    product = torch.randn(4096, 4096, device="cuda")
    for _ in range(100):
        product = torch.sin(product @ product)
    return product


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return _tensors()


@pytest.fixture
def layout(tensors: dict[str, torch.Tensor]) -> Layout:
    return plan_layout([describe(tensors, replicated=True)])


@pytest.fixture
def arena() -> Iterator[Path]:
    """A folder in shared memory."""
    with tempfile.TemporaryDirectory(dir=default_arena_dir()) as folder:
        yield Path(folder)


@pytest.fixture
def slot(layout: Layout, arena: Path) -> Iterator[Slot]:
    slot = Slot(arena / "slot", "run", layout.bulk_bytes(0))
    slot.begin(Stamp(Version(1, True), 1, 1, layout.digest, 0, 0))
    yield slot
    slot.close()


def _held(layout: Layout, slot: Slot) -> list[torch.Tensor]:
    return [view.clone() for view in slot_views(layout, 0, slot.bulk)]


@pytest.fixture
def warm(tensors: dict[str, torch.Tensor], layout: Layout, slot: Slot) -> None:
    """Run all operations once, because the first use of each blocks."""
    busy = _keep_busy()
    tensors["weight0"].copy_(busy[:SIZE, :SIZE])
    Stager(layout, 0).take(slot.bulk, tensors, ())
    pack_late({"mean": busy.mean(), "last": busy[0, :5]})
    torch.cuda.synchronize()


def test_every_byte_is_copied(tensors: dict[str, torch.Tensor], layout: Layout, slot: Slot) -> None:
    stager, halves = Stager(layout, 0), []
    stager.finish(stager.take(slot.bulk, tensors, ()), lambda: halves.append(1))
    expected = [view.cpu() for view in live_views(layout, 0, 0, tensors)]
    differing = [
        chunk.name
        for chunk, found, want in zip(layout.of(0), _held(layout, slot), expected, strict=True)
        if not torch.equal(found.flatten(), want.flatten())
    ]
    stager.close()
    assert differing == []
    assert halves == [1]


@pytest.mark.usefixtures("warm")
def test_copies_are_taken_after_the_queued_work(tensors: dict[str, torch.Tensor], layout: Layout, slot: Slot) -> None:
    stager = Stager(layout, 0)
    busy = _keep_busy()
    tensors["weight0"].copy_(busy[:SIZE, :SIZE])
    load = stager.take(slot.bulk, tensors, ())
    assert not torch.cuda.current_stream().query(), "the capture waited for the device"
    stager.finish(load)
    stager.close()
    held = [view for chunk, view in zip(layout.of(0), _held(layout, slot), strict=True) if chunk.name == "weight0"]
    assert torch.equal(torch.cat([view.flatten() for view in held]), busy[:SIZE, :SIZE].flatten().cpu())


def test_tensors_copied_early_may_change_immediately(
    tensors: dict[str, torch.Tensor], layout: Layout, slot: Slot
) -> None:
    stager = Stager(layout, 0)
    before = tensors["mean"].cpu()
    load = stager.take(slot.bulk, tensors, ("mean",))
    tensors["mean"].zero_()
    stager.finish(load)
    places = [chunk.name for chunk in layout.of(0)]
    assert torch.equal(_held(layout, slot)[places.index("mean")].flatten(), before)
    assert load.changed() is None
    stager.close()


def test_tensors_may_change_once_the_copy_into_a_buffer_is_queued(
    tensors: dict[str, torch.Tensor], layout: Layout, slot: Slot
) -> None:
    stager = Stager(layout, 0, buffered=True)
    stager.finish(stager.take(slot.bulk, tensors, tensors.keys()))
    for step in range(3):
        before = {name: tensor.cpu() for name, tensor in tensors.items()}
        _keep_busy()
        pending = stager.take(slot.bulk, tensors, tensors.keys())
        assert not torch.cuda.current_stream().query(), "the capture waited for the device"
        for tensor in tensors.values():
            tensor.add_(step + 1)
        stager.finish(pending)
        for chunk, view, live in zip(layout.of(0), _held(layout, slot), live_views(layout, 0, 0, before), strict=True):
            assert torch.equal(view.flatten(), live.flatten()), chunk.name
    stager.close()


def test_a_write_to_a_late_tensor_is_detected(tensors: dict[str, torch.Tensor], layout: Layout, slot: Slot) -> None:
    stager = Stager(layout, 0)
    load = stager.take(slot.bulk, tensors, ())
    tensors["weight1"].add_(1)
    stager.finish(load)
    assert load.changed() == "weight1"
    stager.close()


@pytest.mark.parametrize("in_shared_memory", [True, False])
def test_slots_can_be_created_and_closed_repeatedly(
    in_shared_memory: bool, tensors: dict[str, torch.Tensor], layout: Layout, arena: Path, tmp_path: Path
) -> None:
    for number in range(3):
        folder = arena if in_shared_memory else tmp_path
        slot = Slot(folder / str(number), "run", layout.bulk_bytes(0))
        slot.begin(Stamp(Version(1, True), 1, 1, layout.digest, 0, 0))
        stager = Stager(layout, 0)
        stager.finish(stager.take(slot.bulk, tensors, ()))
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
        (first, *_), (expected, *_) = _held(layout, slot), live_views(layout, 0, 0, tensors)
        stager.close()
        slot.close()
        assert torch.equal(first.flatten(), expected.flatten().cpu())
        slot.path.unlink()


@pytest.mark.usefixtures("warm")
def test_packing_host_state_does_not_wait_for_the_device() -> None:
    busy = _keep_busy()
    state = {"mean": busy.mean(), "count": torch.tensor(3), "nested": [{"last": busy[0, :5]}], "text": "x"}
    late = pack_late(state)
    assert not torch.cuda.current_stream().query(), "packing waited for the device"
    assert callable(late)
    expected = {"mean": state["mean"].clone(), "last": busy[0, :5].clone()}  # type: ignore[attr-defined]
    busy.zero_()
    found = unpack(late())
    assert found["mean"].is_cuda
    assert torch.equal(found["mean"], expected["mean"])
    assert torch.equal(found["nested"][0]["last"], expected["last"])
    assert (int(found["count"]), found["text"]) == (3, "x")
