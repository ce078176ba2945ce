from argparse import Namespace
from pathlib import Path

from benchmarks.staging import in_turns, measure_staging, tables


def test_a_staged_shard_is_measured_as_often_as_memcpy(tmp_path: Path) -> None:
    found = measure_staging("tiny", tmp_path, ranks=2, repeats=3)

    assert len(found["memcpy_s"]) == len(found["stage_s"]) == 3
    assert 100_000 < found["shard_bytes"] < 200_000
    assert list(tmp_path.iterdir()) == []


def test_the_two_functions_alternate() -> None:
    order: list[str] = []

    times = in_turns(lambda: order.append("a"), lambda: order.append("b"), repeats=2)

    assert order == ["a", "b"] * 4
    assert [len(seconds) for seconds in times] == [2, 2]


def test_the_table() -> None:
    row = {"size": "1M", "ranks": 2, "shard_bytes": 10_000_000, "pieces": 3, "memcpy_s": [0.001], "stage_s": [0.0012]}
    (staging,) = tables(Namespace(), {"staging": [row]})
    assert staging.rows == [("1M", "2", "10.00", "3", "1.00", "10.0", "1.20", "8.3", "1.20")]
    assert staging.notes == ["1M, 2 ranks: 1.20 x memcpy (target 1.25 x memcpy): met"]
