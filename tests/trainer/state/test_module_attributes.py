"""What layers keep as attributes is taken along: all that may change, and little else."""

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


def there_and_back(source: Any, inner: ModuleAttributes) -> Any:
    """Another model, with what was captured of this one."""
    saved, fresh = unpack(pack(inner.capture())), Net()
    ModuleAttributes(fresh).apply(saved)
    return fresh


def test_attributes_of_layers_come_back() -> None:
    net = Net()
    inner = ModuleAttributes(net)
    net.layer.count, net.layer.late = 3, "made later"
    net.layer.seen.append(7)
    net.dropout.p, net.norm.momentum, net.norm.training = 0.5, 0.25, False
    fresh = there_and_back(net, inner)
    assert (fresh.layer.count, fresh.layer.seen, fresh.layer.late) == (3, [7], "made later")
    assert (fresh.dropout.p, fresh.norm.momentum) == (0.5, 0.25)
    assert isinstance(fresh.layer.linear, nn.Linear)


def test_tensors_travel_only_when_they_were_changed() -> None:
    net = Net()
    inner = ModuleAttributes(net)
    net.layer.written.add_(1)
    net.layer.replaced = torch.zeros(3)
    assert {*inner.capture()["plain"]["layer"]} == {"count", "seen", "written", "replaced"}
    fresh = there_and_back(net, inner)
    assert fresh.layer.written.tolist() == [2.0, 2.0]
    assert fresh.layer.replaced.tolist() == [0.0, 0.0, 0.0]


def test_generators_of_layers_go_on() -> None:
    net = Net()
    inner = ModuleAttributes(net)
    torch.rand(1, generator=net.layer.noise)
    fresh = there_and_back(net, inner)
    assert torch.equal(torch.rand(2, generator=fresh.layer.noise), torch.rand(2, generator=net.layer.noise))


def test_which_parameters_are_trained_comes_back() -> None:
    net = Net()
    inner = ModuleAttributes(net)
    net.layer.linear.weight.requires_grad_(False)
    fresh = there_and_back(net, inner)
    assert [name for name, p in fresh.named_parameters() if not p.requires_grad] == ["layer.linear.weight"]


def test_the_model_itself_and_metrics_are_left_to_others() -> None:
    net = Net()
    inner = ModuleAttributes(net)
    net.own = 6
    net.metric.update(2.0)
    fresh = there_and_back(net, inner)
    assert fresh.own == 5
    assert fresh.metric.update_count == 0
