"""The benchmark of large models: which cells fit, and its tables from synthetic measurements."""

from __future__ import annotations

from argparse import Namespace

import pytest

from benchmarks.sharded import Cell, cells, plain_step_ms, tables, version_costs_ms

LARGE = Cell("300M", 4, "DDP", 3_600_000_000)
STEPS = [1.5, 1.0, 1.1, 1.3, 1.4, 1.0, 1.0, 1.2]
CELL = {
    "size": "33M", "ranks": 2, "strategy": "FSDP2", "state_bytes": 400_000_000, "kept": 1,
    "mirrored": {"ranks": [
        {"steps_s": STEPS, "arena_bytes": 1_604_000_000, "sent_bytes": 200_000_000, "stage_s": [0.02],
         "round_s": [0.2, 0.4]},
        {"steps_s": STEPS, "arena_bytes": 1_604_000_000, "sent_bytes": 199_000_000, "stage_s": [0.04],
         "round_s": [0.3]},
    ]},
    "saved": {"saves": [{"blocked_s": 0.5, "total_s": 2.0}]},
}  # fmt: skip


def test_a_cell_keeps_shards_for_others_if_they_fit() -> None:
    assert [LARGE.kept_shards(gb * 10**9) for gb in (64, 40, 20)] == [1, 0, None]


def test_sharded_training_takes_less() -> None:
    data_parallel, sharded = cells(["33M"], [2])
    assert (data_parallel.strategy, sharded.strategy) == ("DDP", "FSDP2")
    assert sharded.needed_bytes(1) < data_parallel.needed_bytes(1)
    assert sharded.state_bytes == data_parallel.state_bytes


def test_a_version_costs_its_two_steps_minus_the_others() -> None:
    assert version_costs_ms(CELL) == pytest.approx([700.0, 600.0])
    assert plain_step_ms(CELL) == 1000.0


def test_the_tables() -> None:
    of_bytes, versions = tables(Namespace(), {"cells": [CELL], "left_out": ["300M, DDP, 4 ranks: too large"]})
    assert of_bytes.rows == [("33M", "FSDP2", "2", "400", "1", "800", "802", "+0.25%", "200")]
    assert of_bytes.notes[-1] == "Left out: 300M, DDP, 4 ranks: too large"
    assert versions.rows[0][3:] == ("1000", "650", "600 to 700", "+65.0%", "30", "300", "500", "2000")
