"""Attributes too large to mirror with every step are excluded by name."""

from __future__ import annotations

import numpy as np
import torch

from lightning_ckptless.trainer.state.plain_values import heavy_attributes


class Owner:
    """Stands in for a datamodule."""

    def __init__(self) -> None:
        self.counter = 3
        self.images = torch.zeros(1000, 1000)
        self.rows = np.zeros((1000, 1000))
        self.names = ["a name of a file"] * 200_000
        self.table = {str(i): float(i) for i in range(300_000)}
        self.few = [torch.zeros(10)] * 10


def test_attributes_above_the_limit_are_heavy() -> None:
    assert heavy_attributes(Owner(), 1_000_000) == ("images", "rows", "names", "table")


def test_no_attribute_below_the_limit_is_heavy() -> None:
    assert heavy_attributes(Owner(), 1_000_000_000) == ()
