"""What the agent sees of its workers while they recover, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from lightning_ckptless.membership.agent.hang_watch import HangWatch
from lightning_ckptless.membership.agent.workers import WorkerGroup
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.protocol.hang_detection import STOPPED_S, RegroupStatus

UNDER_WAY = RegroupStatus(
    coming={}, unreleased={1: 100.0}, ready={0: 100.0}, created={}, regrouped=(), startup_s=1.0, is_whole=True
)


@pytest.fixture
def stopped() -> Iterator[int]:
    """The pid of a process that a signal has stopped."""
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        yield child.pid
        os.kill(child.pid, signal.SIGCONT)


class Workers:
    """Local ranks with the pids of real processes."""

    def __init__(self, *pids: int) -> None:
        self._pids = dict(enumerate(pids))

    def pids(self) -> dict[int, int]:
        return self._pids


def test_a_stopped_survivor_is_found_while_the_ranks_recover(tmp_path: Path, stopped: int) -> None:
    now = 100.0
    watch = HangWatch(tmp_path, print, Clock(lambda: now, lambda: now))
    workers = cast("WorkerGroup", Workers(os.getpid(), stopped))
    assert watch.poll_regroup(UNDER_WAY, workers) is None
    now += STOPPED_S + 0.5
    found = watch.poll_regroup(UNDER_WAY, workers)
    assert found is not None
    assert (found.ranks, found.reason) == ((1,), "stopped by a signal for 10.5 s while the ranks recover")

    os.kill(stopped, signal.SIGCONT)
    os.waitpid(stopped, os.WCONTINUED)
    assert watch.poll_regroup(UNDER_WAY, workers) is None
