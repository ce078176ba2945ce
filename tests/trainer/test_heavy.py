"""What is too large to travel with every step is named and left out; the rest goes along."""

from __future__ import annotations

import numpy as np
import torch

from lightning_ckptless.trainer.state.plain_values import heavy_attributes


class Owner:
    """A datamodule of sorts."""

    def __init__(self) -> None:
        self.counter = 3
        self.images = torch.zeros(1000, 1000)
        self.rows = np.zeros((1000, 1000))
        self.names = ["a name of a file"] * 200_000
        self.table = {str(i): float(i) for i in range(300_000)}
        self.few = [torch.zeros(10)] * 10


def test_heavy_attributes_are_those_beyond_the_limit() -> None:
    assert heavy_attributes(Owner(), 1_000_000) == ("images", "rows", "names", "table")


def test_nothing_is_heavy_below_the_limit() -> None:
    assert heavy_attributes(Owner(), 1_000_000_000) == ()
