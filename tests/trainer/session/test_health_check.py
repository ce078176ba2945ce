"""An unfit node fails its health check before it joins the others."""

from __future__ import annotations

import psutil
import pytest
import torch

from lightning_ckptless.errors import OptionsError, UnfitNodeError
from lightning_ckptless.trainer.session.health_check import check_health

CPU = torch.device("cpu")


def refuse() -> None:
    """A user's check that fails."""
    raise ConnectionError("no link to the switch")


def test_a_healthy_node_passes() -> None:
    check_health(CPU, "", "node0")
    check_health(CPU, "os.getpid", "node0")


def test_the_users_own_check_is_called() -> None:
    with pytest.raises(UnfitNodeError, match=r"node7 failed its health check: .*refuse raised ConnectionError"):
        check_health(CPU, f"{refuse.__module__}.refuse", "node7")


@pytest.mark.parametrize("name", ["nothing.there", "os.nothing", "plain"])
def test_a_check_that_does_not_exist_is_an_options_error(name: str) -> None:
    with pytest.raises(OptionsError, match=f"health_check='{name}'"):
        check_health(CPU, name, "node0")


def test_too_little_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 10 * 2**20

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    with pytest.raises(UnfitNodeError, match="10 MiB of memory are available, at least 256 MiB are required"):
        check_health(CPU, "", "node0")


def test_a_missing_device_is_reported() -> None:
    with pytest.raises(UnfitNodeError, match="cuda:7 failed to multiply"):
        check_health(torch.device("cuda:7"), "", "node0")
