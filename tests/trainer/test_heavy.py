"""Attributes too large to mirror with every step are excluded by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_ckptless.trainer.state.host_state import HostState
from lightning_ckptless.trainer.state.plain_values import heavy_attributes
from tests.trainer.tiny import callback, tiny_loader, tiny_module, tiny_trainer


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


def test_the_buffers_of_a_model_are_not_heavy_attributes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are tensors of the version, so nothing about them is lost."""
    module = tiny_module()
    module.register_buffer("table", torch.zeros(3_000_000))
    module.cache = torch.zeros(3_000_000)

    def look(trainer: Any, _: Any) -> None:
        HostState(trainer).capture()

    tiny_trainer(tmp_path, max_steps=1, callbacks=[callback(on_train_start=look)]).fit(module, tiny_loader())
    warned = [record.message for record in caplog.records if "is larger than" in record.message]
    assert [message.split()[1] for message in warned] == [f"{type(module).__name__}.cache"]
