"""A pulse that is read while it is written."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from lightning_ckptless.membership.pulse import PulseWriter, pulse_path, read_pulse
from lightning_ckptless.protocol.hang import Point

LOOKS = 3000


def test_a_pulse_is_never_read_half_written(tmp_path: Path) -> None:
    began_at = time.monotonic()
    pulse = PulseWriter(pulse_path(tmp_path, 0))
    pulse.beat(1, Point.BATCH)
    worker = os.fork()
    if not worker:
        while True:
            pulse.beat(2, Point.BACKWARD)
    try:
        seen = [read_pulse(tmp_path, 0, worker) for _ in range(LOOKS)]
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        pulse.close()
    assert all(found is not None and found.at >= began_at and found.step in (1, 2) for found in seen)
