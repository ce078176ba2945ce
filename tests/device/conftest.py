"""Skips what is here where there is no CUDA device."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _needs_a_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # The context, with its files and threads, stays until the process ends; and the first use of a kernel waits.
    product = torch.randn(64, 64, device="cuda") @ torch.randn(64, 64, device="cuda")
    (product.mean() + product[0, :5].clone().sum()).item()
