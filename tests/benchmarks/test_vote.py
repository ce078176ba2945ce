"""The table of votes has a row for each way, and the medians of all ranks."""

from __future__ import annotations

from benchmarks.vote import WAYS, Vote


def test_the_blocks_of_all_ranks_count() -> None:
    ranks = [[{"way": way, "us": us + rank, "cpu_us": us / 10} for way in WAYS for us in (10, 20)] for rank in (0, 2)]
    (table,) = Vote().tables({"2": ranks})
    for way in WAYS:
        assert f"| 2 ranks, {way} | 16 | 1.5 |" in table.markdown()
