"""The private torch names that we touch: each test fails loudly when a new version moves one."""

from __future__ import annotations

import torch

from lightning_ckptless import torch_internals


def test_the_version_counter_counts_writes_in_place() -> None:
    tensor = torch.zeros(3)
    before = torch_internals.version_counter(tensor)
    tensor.add_(1)
    tensor.detach()[0] = 5
    assert torch_internals.version_counter(tensor) == before + 2


def test_foreach_copy_copies_and_counts() -> None:
    targets = [torch.zeros(2, 3), torch.zeros((), dtype=torch.int64), torch.empty(0)]
    sources = [torch.arange(6.0).reshape(3, 2).t(), torch.tensor(7), torch.empty(0)]
    before = torch_internals.version_counter(targets[0])
    torch_internals.foreach_copy(targets, sources)
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))
    assert torch_internals.version_counter(targets[0]) > before


def test_foreach_copy_takes_nothing() -> None:
    torch_internals.foreach_copy([], [])
