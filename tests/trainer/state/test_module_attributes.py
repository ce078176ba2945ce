"""Attributes of layers are captured: everything that may change, and little else."""

from __future__ import annotations

from typing import Any

import torch
import torchmetrics
from torch import nn

from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.trainer.state.module_attributes import ModuleAttributes


class Layer(nn.Module):
    late: Any

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.count, self.seen = nn.Linear(2, 2), 0, list[int]()
        self.table, self.written, self.replaced = torch.ones(1000), torch.ones(2), torch.ones(2)
        self.noise = torch.Generator().manual_seed(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout, self.norm = Layer(), nn.Dropout(0.1), nn.BatchNorm1d(2)
        self.metric, self.own = torchmetrics.MeanMetric(), 5


def round_trip(attributes: ModuleAttributes) -> Any:
    """Return a fresh model with the captured attributes applied."""
    saved, fresh = unpack(pack(attributes.capture())), Net()
    ModuleAttributes(fresh).apply(saved)
    return fresh


def test_attributes_of_layers_are_restored() -> None:
    net = Net()
    attributes = ModuleAttributes(net)
    net.layer.count, net.layer.late = 3, "made later"
    net.layer.seen.append(7)
    net.dropout.p, net.norm.momentum, net.norm.training = 0.5, 0.25, False
    fresh = round_trip(attributes)
    assert (fresh.layer.count, fresh.layer.seen, fresh.layer.late) == (3, [7], "made later")
    assert (fresh.dropout.p, fresh.norm.momentum) == (0.5, 0.25)
    assert isinstance(fresh.layer.linear, nn.Linear)


def test_tensors_are_captured_only_if_they_changed() -> None:
    net = Net()
    attributes = ModuleAttributes(net)
    net.layer.written.add_(1)
    net.layer.replaced = torch.zeros(3)
    assert {*attributes.capture()["plain"]["layer"]} == {"count", "seen", "written", "replaced"}
    fresh = round_trip(attributes)
    assert fresh.layer.written.tolist() == [2.0, 2.0]
    assert fresh.layer.replaced.tolist() == [0.0, 0.0, 0.0]


def test_generators_of_layers_are_restored() -> None:
    net = Net()
    attributes = ModuleAttributes(net)
    torch.rand(1, generator=net.layer.noise)
    fresh = round_trip(attributes)
    assert torch.equal(torch.rand(2, generator=fresh.layer.noise), torch.rand(2, generator=net.layer.noise))


def test_requires_grad_is_restored() -> None:
    net = Net()
    attributes = ModuleAttributes(net)
    net.layer.linear.weight.requires_grad_(False)
    fresh = round_trip(attributes)
    assert [name for name, p in fresh.named_parameters() if not p.requires_grad] == ["layer.linear.weight"]


def test_the_model_itself_and_its_metrics_are_not_captured() -> None:
    net = Net()
    attributes = ModuleAttributes(net)
    net.own = 6
    net.metric.update(2.0)
    fresh = round_trip(attributes)
    assert fresh.own == 5
    assert fresh.metric.update_count == 0


def test_a_tensor_that_had_not_changed_is_undone_in_a_survivor() -> None:
    net = Net()
    attributes = ModuleAttributes(net)
    before, written = unpack(pack(attributes.capture())), net.layer.written
    net.layer.written.add_(1)
    net.layer.replaced = torch.zeros(3)
    attributes.apply(before)
    assert net.layer.written is written and written.tolist() == [1.0, 1.0] == net.layer.replaced.tolist()
    assert {*attributes.capture()["plain"]["layer"]} == {"count", "seen"}


def test_wrappers_of_metrics_keep_what_they_count() -> None:
    class Wrapped(Net):
        def __init__(self) -> None:
            super().__init__()
            self.running = torchmetrics.wrappers.Running(torchmetrics.SumMetric(), window=3)
            self.extremes = torchmetrics.MinMaxMetric(torchmetrics.MeanMetric())

    net, fresh = Wrapped(), Wrapped()
    attributes = ModuleAttributes(net)
    for value in (3.0, 5.0):
        net.running.update(value)
        net.extremes.update(value)
        net.extremes.compute()
    ModuleAttributes(fresh).apply(unpack(pack(attributes.capture())))
    assert fresh.running._num_vals_seen == 2
    assert (float(fresh.extremes.min_val), float(fresh.extremes.max_val)) == (3.0, 4.0)
