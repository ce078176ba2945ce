"""What the agent makes of the progress that workers write."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ckptless.membership.agent.straggler_watch import StragglerWatch
from lightning_ckptless.membership.clock import Clock
from lightning_ckptless.membership.events import Event, StepTimes, StragglerFound
from lightning_ckptless.membership.worker.progress import ProgressWriter, progress_path
from lightning_ckptless.protocol.hang_detection import Point
from lightning_ckptless.protocol.stragglers import DRAIN_EVERY_S, StragglerOptions, StragglerPlan

RANKS = {0: 4, 1: 5}
"""The node has ranks 4 and 5."""


class Node:
    """Two workers whose progress is written here, and an agent that looks at it on a clock of its own."""

    inside = frozenset({0, 1})

    def __init__(self, folder: Path, *pids: int) -> None:
        self.now = 1000.0
        self.folder = folder
        self._pids = dict(enumerate(pids))
        self.events: list[Event] = []
        self.watch = StragglerWatch(folder, self.events.append, Clock(lambda: self.now, lambda: self.now))

    def pids(self) -> dict[int, int]:
        return dict(self._pids)

    def replace(self, local_rank: int, pid: int) -> None:
        self._pids[local_rank] = pid

    def takes(self, local_rank: int, own_s: float) -> None:
        """Write two steps of a worker, of which the first takes long in every process."""
        times = iter((1.0, 9.0, 10.0, 10.0 + own_s))
        writer = ProgressWriter(progress_path(self.folder, local_rank), lambda: next(times))
        for step in (1, 2):
            writer.beat(step, Point.BATCH)
            writer.beat(step, Point.BACKWARD)
        writer.close()

    def after(self, seconds: float, options: StragglerOptions, *, is_draining: bool = False) -> StragglerPlan | None:
        self.now += seconds
        return self.watch.poll(self, RANKS, options, is_draining=is_draining)


@pytest.fixture
def other() -> Iterator[int]:
    """The pid of another process."""
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        yield child.pid


@pytest.fixture
def node(tmp_path: Path, other: int) -> Node:
    made = Node(tmp_path, os.getpid(), other)
    made.takes(0, 0.125)
    made.takes(1, 0.375)
    return made


def test_a_straggler_is_drained_after_the_set_time(node: Node) -> None:
    options = StragglerOptions(drain_after_s=30.0)
    assert node.after(2, options) is None
    assert node.after(29, options) is None
    plan = node.after(2, options)
    assert plan is not None
    assert (plan.rank, plan.reason) == (
        5, "straggler: rank 5 takes 375.0 ms per step, 3.0x the median of the others for 31.0 s",
    )  # fmt: skip


def test_the_time_of_another_process_starts_from_zero(node: Node) -> None:
    options = StragglerOptions(drain_after_s=30.0)
    node.after(2, options)
    node.after(29, options)
    node.replace(1, os.getppid())
    assert node.after(2, options) is None
    assert node.after(29, options) is None
    assert node.after(2, options) is not None


def test_a_rank_that_was_slow_for_a_moment_is_not_drained(node: Node) -> None:
    options = StragglerOptions(drain_after_s=30.0)
    node.after(2, options)
    node.takes(1, 0.125)
    node.after(29, options)
    node.takes(1, 0.375)
    assert node.after(2, options) is None


def test_the_next_straggler_is_drained_an_hour_later(node: Node) -> None:
    options = StragglerOptions(drain_after_s=0.0)
    assert node.after(2, options) is not None
    assert node.after(2, options) is None
    assert node.after(DRAIN_EVERY_S, options) is not None


def test_no_straggler_is_drained_during_a_drain(node: Node) -> None:
    options = StragglerOptions(drain_after_s=0.0)
    assert node.after(2, options, is_draining=True) is None
    assert node.after(2, options) is not None


def test_a_straggler_is_reported_once_a_minute_with_what_would_be_done(node: Node) -> None:
    for _ in range(3):
        assert node.after(30, StragglerOptions()) is None
    times, found = node.events
    assert times == StepTimes({0: 125.0, 1: 375.0})
    assert isinstance(found, StragglerFound)
    assert (found.slow_rank, found.own_ms, found.ratio) == (5, 375.0, 3.0)
    assert found.sentence == (
        "straggler: rank 5 takes 375.0 ms per step, 3.0x the median of the others; drain_stragglers_after_s is not "
        "set; with a time, another process would take the rank after it"
    )
