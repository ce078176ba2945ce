from pathlib import Path

from benchmarks.harness.staging import in_turns, measure_staging


def test_a_staged_shard_is_measured_as_often_as_memcpy(tmp_path: Path) -> None:
    found = measure_staging("tiny", tmp_path, ranks=2, repeats=3)

    assert len(found["memcpy_s"]) == len(found["stage_s"]) == len(found["take_s"]) == 3
    assert 100_000 < found["shard_bytes"] < 200_000
    assert list(tmp_path.iterdir()) == []


def test_the_two_functions_alternate() -> None:
    order: list[str] = []

    times = in_turns(lambda: order.append("a"), lambda: order.append("b"), repeats=2)

    assert order == ["a", "b"] * 4
    assert [len(seconds) for seconds in times] == [2, 2]
