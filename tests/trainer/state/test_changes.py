"""Containers of tensors that change while they are watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_ckptless.trainer.state.changes import Changes


class Owner:
    """An object with one attribute."""

    def __init__(self, held: Any) -> None:
        self.held = held


@pytest.mark.parametrize("make", [list, tuple, lambda parts: dict(enumerate(parts))], ids=["list", "tuple", "dict"])
def test_tensors_of_a_container_get_their_values_back(make: Callable[[list[torch.Tensor]], Any]) -> None:
    shared, turned = torch.arange(4.0), torch.arange(6).reshape(2, 3).T
    owner = Owner(make([shared, shared, turned]))
    changes = Changes([("owner", owner)])
    for _ in range(2):
        for tensor in (owner.held[0], owner.held[2]):
            tensor.add_(1)
        assert changes.capture()["owner"]["set"]["held"][0].tolist() == [1, 2, 3, 4]
        changes.apply({})
        assert [owner.held[index].tolist() for index in range(3)] == [[0, 1, 2, 3]] * 2 + [[[0, 3], [1, 4], [2, 5]]]
        assert owner.held[0] is owner.held[1]
