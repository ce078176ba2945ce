"""Skips the tests in this folder if there is no CUDA device."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _needs_a_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # Creates the CUDA context, which stays until the process ends, and loads kernels, whose first use blocks.
    product = torch.randn(64, 64, device="cuda") @ torch.randn(64, 64, device="cuda")
    (product.mean() + product[0, :5].clone().sum()).item()
