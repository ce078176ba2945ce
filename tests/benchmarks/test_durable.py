"""The tables of the benchmark of durable states, from synthetic measurements."""

from __future__ import annotations

from typing import Any

from benchmarks.durable import Durable, variants

STEADY, SLOWED = [[0.010, 0.010], [0.020, 0.020]], [[0.012, 0.012], [0.024, 0.026]]


def segments(rounds: list[list[float]], *writes: dict[str, float]) -> list[dict[str, Any]]:
    """The slower of two ranks makes the given steps."""
    return [{"ranks": [{"steps_s": steps}, {"steps_s": [0.001] * 2}], "writes": [*writes]} for steps in rounds]


RESULTS = {
    "sizes": {
        "tiny": {
            "ddp": segments(STEADY),
            "ddp, async_save": segments(SLOWED, {"blocked_s": 0.02, "total_s": 0.3, "bytes": 3.2e6}),
            "ckptless": segments(STEADY),
            "ckptless, durable": segments(STEADY, {"copied_s": 0.001, "total_s": 0.2, "bytes": 3.1e6}),
        }
    }
}


def test_steps_are_compared_with_those_of_the_same_strategy() -> None:
    steps, _ = Durable().tables(RESULTS)
    rows = {row[1]: row for row in steps.rows}
    assert rows["ddp"][-1] == rows["ckptless"][-1] == ""
    assert rows["ddp, async_save"][2:] == ("18.0", "18.5", "26.0", "+22.5%")
    assert rows["ckptless, durable"][-1] == "+0.0%"


def test_only_variants_that_write_have_a_row() -> None:
    _, writes = Durable().tables(RESULTS)
    assert [row[2:] for row in writes.rows] == [
        ("ddp, async_save", "1", "3.2", "20.0", "", "300.0"),
        ("ckptless, durable", "1", "3.1", "0.0", "1.0", "200.0"),
    ]


def test_the_variants_differ_in_what_they_write() -> None:
    jobs = variants("tiny").values()
    assert [(job.strategy, bool(job.strategy_options or job.async_save_every)) for job in jobs] == [
        ("ddp", False), ("ddp", True), ("ckptless", False), ("ckptless", True),
    ]  # fmt: skip
