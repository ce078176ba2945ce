"""Standbys: processes that have reached `fit` and wait for a rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.forkserver.process import Process
from lightning_ckptless.membership.forkserver.standby import Standbys
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.membership.worker.startup import Job
from tests.membership.conftest import worker_env

READY = """
import time
from lightning_ckptless.membership.channel.agent_channel import open_channel
from lightning_ckptless.protocol.messages import StandbyReady

open_channel().send(StandbyReady())
time.sleep(1000)
"""


class FreesItsMemory(Process):
    """A process as the kernel shows it in the moments between its death and its exit."""

    def is_dying(self) -> bool:
        """Whether it has released its address space."""
        return True


@pytest.mark.parametrize("kind", [Process, FreesItsMemory])
def test_a_standby_that_dies_at_the_moment_of_the_fault_is_not_used_and_leaves_nothing_behind(
    kind: type[Process], bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    program = Program("script", str(write(READY)))
    before = set(os.listdir("/proc/self/fd"))

    def start(stdio: list[int]) -> Process:
        return kind.start(bare, Job(program, worker_env(), str(tmp_path)), stdio)

    standbys = Standbys(1, start, tmp_path, print)
    while not standbys.ready:
        standbys.maintain()
    taken = standbys.take()
    assert (taken is None) is (kind is FreesItsMemory)
    standbys.stop()
    if taken is not None:
        taken.signal(9)
        taken.leave(10.0)
    assert set(os.listdir("/proc/self/fd")) == before
