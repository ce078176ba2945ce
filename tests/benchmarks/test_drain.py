"""The table of the pauses when ranks are drained."""

from __future__ import annotations

from typing import Any

from benchmarks.drain import Drain


def drain(rank: int, pause_s: float) -> dict[str, Any]:
    phases = {"detect_s": 0.01, "regroup_s": 0.05, "restore_s": 0.02}
    return {
        "rank": rank,
        "step_s": 0.1,
        "pause_s": pause_s,
        "exit_code": 0,
        "ledger": {"phases": phases, "steps_replayed": 0},
    }


def test_rank_0_has_a_row_of_its_own() -> None:
    drains = [drain(0, 0.2), drain(3, 0.1), drain(0, 0.4), drain(1, 0.1)]
    (table,) = Drain().tables({"drains": drains})
    text = table.markdown()
    assert "| rank 0 | 2 | 2 | 0 | 0.100 | 0.300 |" in text
    assert "| another rank | 2 | 2 | 0 | 0.100 | 0.100 |" in text
    assert "median of all: 0.15 s (target 0.1 s): missed" in text
