import cProfile
import json
import threading
import time
from typing import Any

import pytest

from benchmarks.jobs.cpu_account import BACKWARD, FORWARD, MIRROR, OTHERS, CpuAccount
from benchmarks.jobs.gpt import state_bytes
from benchmarks.jobs.profiled import by_file
from benchmarks.steady_state import (
    CKPTLESS,
    DDP,
    SteadyState,
    cpu_table,
    measured,
    profile_of,
    split_table,
    training_cpu_ms,
    training_ms,
)


def segment(step_ms: float, **parts: Any) -> dict[str, Any]:
    ranks = [{"steps_s": [1e-3 * step_ms] * 3, **parts}, {"steps_s": [0.5e-3 * step_ms] * 3, **parts}]
    return {"ranks": ranks, "cpu_s": {BACKWARD: 1e-3 * step_ms}}


def mirrored(step_ms: float, shard_mb: float) -> dict[str, Any]:
    times = {"commit_s": 0.003, "stall_s": 0.001, "stamp_s": 0.0002, "commit_cpu_s": 0.001, "stamp_cpu_s": 0.0001}
    listed: dict[str, Any] = {name: [seconds] * 3 for name, seconds in times.items()}
    return segment(step_ms, **listed, staged_bytes=shard_mb * 1e6)


def pair(size: str, shard_mb: float) -> dict[str, Any]:
    """Costs 1 ms and 0.1 ms per megabyte more than ddp in the first two rounds; the third is disturbed."""
    cost_ms = 1.0 + 0.1 * shard_mb
    theirs = [segment(10.0), segment(20.0), segment(10.0)]
    ours = [mirrored(10.0 + cost_ms, shard_mb), mirrored(20.0 + cost_ms, shard_mb), mirrored(50.0, shard_mb)]
    return {"size": size, "batch": 2, "segments": {DDP: theirs, CKPTLESS: ours}}


RESULTS: dict[str, Any] = {"pairs": [pair("tiny", 0.1), pair("1M", 10.0), pair("33M", 200.0)]}


DEVICE = {DDP: 0.010, CKPTLESS: 0.012}
STEPS, PARTS, SPLIT = SteadyState().tables(RESULTS)


def test_overhead_is_the_median_of_neighbours_on_the_slower_rank() -> None:
    over = measured(RESULTS["pairs"][1])[1].over()

    assert [round(value, 6) for value in over] == [2.0, 2.0, 40.0]
    row = next(row for row in STEPS.rows if row[0] == "1M" and row[2] == "ckptless")
    assert row[3:7] == ("22.00", "2.00", "2.00 to 40.00", "+20.0%")


def test_the_split_finds_fixed_part_and_part_per_byte() -> None:
    assert SPLIT.rows[0] == ("step time over ddp", "1.00", "10.00")
    assert any("0.10 MB per rank" in note and "2.20 ms (target 1.5 ms): missed" in note for note in SPLIT.notes)


def test_an_outlier_at_a_large_size_moves_the_fixed_part_little() -> None:
    pairs = [
        pair(size, megabytes) for size, megabytes in (("tiny", 0.0), ("1M", 10.0), ("10M", 100.0), ("33M", 1000.0))
    ]
    for segment in pairs[-1]["segments"][CKPTLESS]:
        for rank in segment["ranks"]:
            rank["steps_s"] = [step + 0.01 for step in rank["steps_s"]]
    fixed_ms = split_table([measured(pair)[1] for pair in pairs]).rows[0][1]

    assert float(fixed_ms) == pytest.approx(1.0, abs=0.05)


def test_waits_do_not_count_as_work_of_the_training_thread() -> None:
    ours = measured(RESULTS["pairs"][0])[1]

    assert round(training_ms(ours), 6) == 2.2
    assert round(training_cpu_ms(ours), 6) == 1.1


def test_a_step_on_a_device_is_the_mean_of_its_segment() -> None:
    segments = {name: [{"ranks": [{"mean_s": mean_s}], "cpu_s": {BACKWARD: 0.0}}] for name, mean_s in DEVICE.items()}
    pair = {"size": "33M", "batch": 64, "segments": segments}
    steps, *_ = SteadyState(accelerator="gpu").tables({"pairs": [pair]})
    assert [row[3:5] for row in steps.rows] == [("10.00", ""), ("12.00", "2.00")]


def test_every_mirrored_strategy_has_its_parts() -> None:
    assert [row[0] for row in PARTS.rows] == ["tiny", "1M", "33M"]


def test_the_state_is_three_times_the_parameters() -> None:
    assert 3 * 4 * 30e6 < state_bytes("33M") < 3 * 4 * 36e6


def test_the_cpu_time_over_ddp_is_divided_among_its_parts() -> None:
    theirs, ours = {FORWARD: 0.002, OTHERS: 0.001}, {FORWARD: 0.005, MIRROR: 0.002, OTHERS: 0.0}
    segments = {name: [{**segment(10.0), "cpu_s": cpu_s}] * 2 for name, cpu_s in ((DDP, theirs), (CKPTLESS, ours))}
    rows = cpu_table(measured({"size": "tiny", "batch": 2, "segments": segments})[1]).rows
    assert [row for row in rows if float(row[3])] == [
        (FORWARD, "2.00", "5.00", "3.00", "75%"),
        (MIRROR, "0.00", "2.00", "2.00", "50%"),
        (OTHERS, "1.00", "0.00", "-1.00", "-25%"),
        ("all", "3.00", "7.00", "4.00", "100%"),
    ]


def compute(seconds: float) -> None:
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass


def test_the_cpu_time_of_a_process_is_that_of_its_threads() -> None:
    begun, done, may_exit = threading.Event(), threading.Event(), threading.Event()

    def mirror() -> None:
        begun.wait()
        compute(0.04)
        done.set()
        may_exit.wait()

    thread = threading.Thread(target=mirror, name="ckptless-mirror")
    thread.start()
    try:
        account = CpuAccount()
        compute(0.02)
        account.end(FORWARD)
        compute(0.01)
        account.end(BACKWARD)
        begun.set()
        done.wait()
        other = threading.Thread(target=compute, args=(0.03,))
        other.start()
        other.join()
        spent = account.spent()
    finally:
        begun.set()
        may_exit.set()
        thread.join()

    assert spent.keys() == {FORWARD, BACKWARD, MIRROR, OTHERS}
    for part, seconds in {FORWARD: 0.02, BACKWARD: 0.01, MIRROR: 0.04, OTHERS: 0.03}.items():
        assert spent[part] == pytest.approx(seconds, abs=0.009), part


def test_calls_are_counted_per_version() -> None:
    ranks = [{"versions": 2, "profiles": {MIRROR: {"a": [4, 2, 0.002], "b": [2, 0, 0.00001]}}} for _ in range(2)]
    table = profile_of(MIRROR, [{"ranks": [rank]} for rank in ranks])
    assert table.rows == [("all", "3.0", "1.0", "1005", "100%"), ("a", "2.0", "1.0", "1000", "100%")]


def test_built_in_functions_count_for_the_file_that_calls_them() -> None:
    profile = cProfile.Profile()
    profile.runcall(json.dumps, [1])
    [(name, (calls, built_in, took_s))] = by_file(profile).items()
    assert name == "Python's library"
    assert calls >= 2
    assert built_in >= 1
    assert took_s > 0
