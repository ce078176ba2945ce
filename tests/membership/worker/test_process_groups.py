"""The configuration of a process before it creates its first group."""

from __future__ import annotations

import os

import pytest

from lightning_ckptless.membership.worker.process_groups import World, keep_through_device_errors

NAMES = (
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "TORCH_NCCL_ENABLE_MONITORING",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC",
)


def test_nccl_leaves_the_process_alive_unless_the_user_configures_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in NAMES:
        # So that each is put back, whatever it was.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_ENABLE_MONITORING", "1")
    keep_through_device_errors()
    assert [os.environ[name] for name in NAMES] == ["0", "0", "1", "0", "0"]


class Counted:
    """A wait that counts how often it was aborted."""

    aborted = 0

    def abort(self) -> None:
        """See `Wait.abort`."""
        self.aborted += 1


def test_waits_are_aborted_with_the_groups_of_their_generation() -> None:
    world, wait = World(), Counted()
    world.abort_with_groups(wait)
    world.abort()
    world.abort()
    assert wait.aborted == 2
    world.leave()
    assert wait.aborted == 3
    # The next generation has waits of its own.
    world.abort()
    assert wait.aborted == 3
