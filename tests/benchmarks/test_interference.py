"""The benchmark of the mirror thread's cost to training."""

from __future__ import annotations

import os
import threading
from argparse import Namespace
from typing import Any

from benchmarks.interference import SCHEDULING, tables
from benchmarks.jobs.job import JobOptions
from benchmarks.jobs.training import MIRROR_SCHEDULING, SchedulingProbe, make_strategy


def test_scheduling_is_set_for_the_probed_thread_only() -> None:
    found: list[int] = []

    def mirror() -> None:
        scheduling = SchedulingProbe("nice")
        for moment in ("stage", "send"):
            scheduling(moment, None)
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread = threading.Thread(target=mirror)
    thread.start()
    thread.join()
    assert found == [10] and os.getpriority(os.PRIO_PROCESS, 0) == before


def test_every_scheduling_variant_reaches_the_strategy() -> None:
    assert {*SCHEDULING.values()} == {"", *MIRROR_SCHEDULING}
    probes = [
        make_strategy(JobOptions(strategy="ckptless", mirror_scheduling=scheduling)).probes
        for scheduling in SCHEDULING.values()
    ]
    assert [len(found) for found in probes] == [0, 1, 1, 1]


def test_each_variant_is_compared_with_its_neighbouring_segment() -> None:
    def segment(step_s: float, cpu_s: float) -> dict[str, Any]:
        rank = {"steps_s": [step_s], "stage_s": [0.001], "round_s": [0.004]}
        return {"ranks": [rank, rank], "cpu_per_step_s": cpu_s, "cores_used_by_others": 0.5}

    segments = {
        "ddp": [segment(0.010, 0.02), segment(0.020, 0.02)],
        "nice 10": [segment(0.012, 0.023), segment(0.023, 0.024)],
    }
    (table,) = tables(Namespace(), {"pairs": [{"size": "tiny", "batch": 2, "segments": segments}]})
    step, parts = ("17.50", "2.50", "2.00 to 3.00", "+16.7%", "3.50", "0.50"), ("1.00", "4.00")
    assert table.rows[1] == ("tiny", "2", "nice 10", *step, *parts)
