"""Fixtures for all tests of the trainer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader

from tests.lab.parts import Numbers


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Use one torch thread: small tensors gain nothing from more, and spinning threads slow down other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="package")
def first_worker() -> None:
    """Start a dataloader worker: for the first one in a process, torch installs a signal handler permanently."""
    next(iter(DataLoader(Numbers(1), num_workers=1)))
