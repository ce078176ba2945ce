"""The benchmark of large models: which cells fit, and its tables from synthetic measurements."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from benchmarks.harness.staging import measure_frozen
from benchmarks.sharded import Cell, cells, kept_shards, plain_step_ms, tables, version_costs_ms

LARGE = Cell("300M", 300_000_000, 4, is_sharded=False)
STEPS = [1.5, 1.0, 1.1, 1.3, 1.4, 1.0, 1.0, 1.2]
RESULTS = {
    "cells": [
        {
            "size": "33M", "ranks": 2, "strategy": "FSDP2", "state_bytes": 400_000_000, "kept": 1, "steps_s": STEPS,
            "rank_reports": [
                {"arena_bytes": 1_604_000_000, "sent_bytes": 200_000_000, "stage_s": [0.02], "round_s": [0.2, 0.4]},
                {"arena_bytes": 1_604_000_000, "sent_bytes": 199_000_000, "stage_s": [0.04], "round_s": [0.3]},
            ],
            "saves": [{"blocked_s": 0.5, "total_s": 2.0}],
        }
    ],
    "staging": [
        {"size": "33M", "ranks": 2, "shard_bytes": 2e8, "pieces": 86, "memcpy_s": [0.02], "stage_s": [0.024]},
    ],
    "frozen": [
        {
            "size": "33M", "shard_bytes": 2e8, "static_bytes": 1.8e8, "written_bytes": 2.1e7, "sent_bytes": 2e7,
            "static_s": [0.01], "plain_s": [0.04],
        }
    ],
    "left_out": ["300M, DDP, 4 ranks: too large"],
}  # fmt: skip


def test_a_cell_keeps_shards_for_others_if_they_fit() -> None:
    assert kept_shards(LARGE, 64 * 10**9)[0] == 1
    assert kept_shards(LARGE, 40 * 10**9)[0] == 0
    kept, reason = kept_shards(LARGE, 20 * 10**9)
    assert kept is None
    assert reason == ("300M, DDP, 4 ranks: 24.0 GB of training and 9.6 GB of arenas with 0 kept shards, 20.0 GB free")


def test_sharded_training_takes_less() -> None:
    data_parallel, sharded = cells(["33M"], [2])
    assert (data_parallel.strategy, sharded.strategy) == ("DDP", "FSDP2")
    assert sharded.training_bytes() < data_parallel.training_bytes()
    assert sharded.state_bytes == data_parallel.state_bytes


def test_a_version_costs_its_two_steps_minus_the_others() -> None:
    cell = {"steps_s": STEPS}
    assert [round(cost, 3) for cost in version_costs_ms(cell)] == [700.0, 600.0]
    assert plain_step_ms(cell) == 1000.0


def test_the_tables() -> None:
    of_bytes, versions, staging, frozen = tables(Namespace(), RESULTS)
    assert of_bytes.rows == [("33M", "FSDP2", "2", "400", "1", "800", "802", "+0.25%", "200")]
    assert of_bytes.notes[-1] == "Left out: 300M, DDP, 4 ranks: too large"
    assert versions.rows[0][3:] == ("1000", "650", "600 to 700", "+65.0%", "30", "300", "500", "2000")
    assert staging.rows[0][-1] == "83%"
    assert staging.notes == ["33M, 2 ranks: 1.20 x memcpy (target 1.25 x memcpy): met"]
    assert frozen.rows == [("33M", "200.0", "180.0", "21.0", "20.0", "10.0", "40.0", "25%")]


def test_of_a_frozen_model_little_is_written_and_sent(tmp_path: Path) -> None:
    found = measure_frozen("1M", tmp_path, ranks=2, repeats=1)
    assert found["static_bytes"] > 0.7 * found["shard_bytes"]
    assert found["sent_bytes"] == found["shard_bytes"] - found["static_bytes"]
    assert found["written_bytes"] < 0.5 * found["shard_bytes"]
    assert list(tmp_path.iterdir()) == []
