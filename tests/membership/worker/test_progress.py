"""Progress that is read while it is written."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from lightning_ckptless.membership.worker.progress import ProgressWriter, progress_path, read_progress, step_begun
from lightning_ckptless.protocol.hang_detection import FLOOR_S, Point, limit_s

LOOKS = 3000


def test_progress_is_never_read_half_written(tmp_path: Path) -> None:
    began_at = time.monotonic()
    rank_progress = ProgressWriter(progress_path(tmp_path, 0))
    rank_progress.beat(1, Point.BATCH)
    worker = os.fork()
    if not worker:
        while True:
            rank_progress.beat(2, Point.BACKWARD)
    try:
        seen = [read_progress(tmp_path, 0, worker) for _ in range(LOOKS)]
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        rank_progress.close()
    assert all(found is not None and found.at >= began_at and found.step in (1, 2) for found in seen)


def test_the_silence_before_a_fault_does_not_raise_the_limit_for_the_next_one(tmp_path: Path) -> None:
    now_s = 0.0
    rank_progress = ProgressWriter(progress_path(tmp_path, 0), clock=lambda: now_s)
    for step in range(1, 5):
        now_s += 0.5
        rank_progress.beat(step, Point.BATCH)
    now_s += 10.0
    rank_progress.interrupt()
    rank_progress.beat(4, Point.BATCH)
    now_s += 0.7
    rank_progress.beat(5, Point.BATCH)
    found = read_progress(tmp_path, 0, os.getpid())
    rank_progress.close()
    assert found is not None
    assert found.longest_pause_s == pytest.approx(0.7)
    assert limit_s({0: found}, None) == FLOOR_S


def test_the_last_begun_step_is_known_while_a_version_is_restored(tmp_path: Path) -> None:
    rank_progress = ProgressWriter(progress_path(tmp_path, 0))
    assert step_begun(tmp_path, 0) is None
    rank_progress.beat(7, Point.BACKWARD)
    rank_progress.interrupt()
    interrupted = read_progress(tmp_path, 0, os.getpid())
    assert interrupted is not None and interrupted.point is Point.OUTSIDE
    rank_progress.restore()
    rank_progress.restore()
    restoring = read_progress(tmp_path, 0, os.getpid())
    assert restoring is not None and restoring.position == (0, Point.RESTORE, 1)
    assert step_begun(tmp_path, 0) == 7
    rank_progress.outside()
    assert step_begun(tmp_path, 0) is None
    rank_progress.close()
