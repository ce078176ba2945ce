"""What holds for all tests of this room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader

from tests.lab.parts import Numbers


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread: small tensors gain nothing by more, and threads that spin take from others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="package")
def first_worker() -> None:
    """Start a dataloader's worker: with a process's first one torch sets a signal handler that stays."""
    next(iter(DataLoader(Numbers(1), num_workers=1)))
