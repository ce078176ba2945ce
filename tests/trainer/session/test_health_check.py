"""A node that is not fit says so before it joins anybody."""

from __future__ import annotations

import psutil
import pytest
import torch

from lightning_ckptless.errors import OptionsError, UnfitNodeError
from lightning_ckptless.trainer.session.health_check import check_health

CPU = torch.device("cpu")


def refuse() -> None:
    """A check of a user's that fails."""
    raise ConnectionError("no link to the switch")


def test_a_fit_node_passes() -> None:
    check_health(CPU, "", "node0")
    check_health(CPU, "os.getpid", "node0")


def test_the_users_own_check_is_asked() -> None:
    with pytest.raises(UnfitNodeError, match=r"node7 failed its health check: .*refuse raised ConnectionError"):
        check_health(CPU, f"{refuse.__module__}.refuse", "node7")


@pytest.mark.parametrize("name", ["nothing.there", "os.nothing", "plain"])
def test_a_check_that_is_not_there_is_the_users_mistake(name: str) -> None:
    with pytest.raises(OptionsError, match=f"health_check='{name}'"):
        check_health(CPU, name, "node0")


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 10 * 2**20

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    with pytest.raises(UnfitNodeError, match="10 MiB of memory are available, at least 256 MiB are required"):
        check_health(CPU, "", "node0")


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UnfitNodeError, match="cuda:7 failed to multiply"):
        check_health(torch.device("cuda:7"), "", "node0")
