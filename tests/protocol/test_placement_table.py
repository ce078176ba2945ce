"""The table of a placement: short for any number of ranks."""

from __future__ import annotations

from lightning_ckptless.protocol.placement import place
from lightning_ckptless.protocol.placement_table import MOST_ROWS, as_size, table_of


def test_four_nodes() -> None:
    placement = place(["n0", "n1", "n2", "n3"], 1)
    assert table_of(placement, [1000, 1_234_000, 999, 0], kind="node").lines() == [
        "shard  writer  holders  domains  bytes",
        "0      rank 0  rank 1   n0, n1   1.0 kB",
        "1      rank 1  rank 0   n1, n0   1.2 MB",
        "2      rank 2  rank 3   n2, n3   999 bytes",
        "3      rank 3  rank 2   n3, n2   0 bytes",
        "lost at once  survived                except for",
        "any 1 node    always",
        "any 2 nodes   with probability 0.667  n0 + n1, n2 + n3",
        "any 3 nodes   never",
    ]


def test_a_thousand_ranks_are_summarised() -> None:
    placement = place([f"r{rank // 8}" for rank in range(1000)], 1, kind="rack")
    lines = table_of(placement, [10**9] * 1000, kind="rack").lines()
    assert len(lines) == 1 + MOST_ROWS + 1 + 4
    assert lines[MOST_ROWS + 1] == "and 984 more shards; all copies take 2.0 TB, twice that for two slots"
    assert lines[-2].startswith("any 2 racks   with probability 0.992  r0 + r1, r2 + r3")
    # One of the circles is a ring of three.
    assert lines[-2].endswith(f"and {61 + 3 - 4} more")


def test_losses_that_are_never_survived() -> None:
    assert table_of(place(["a", "b"], 1), [1, 1]).losses[-1] == ("any 2 domains", "never", "")
    assert table_of(place(["a", "a"], 1), [1, 1]).rows[0][2] == "none"


def test_sizes() -> None:
    assert [as_size(size) for size in (0, 999, 1000, 12_345_678, 5e14)] == [
        "0 bytes", "999 bytes", "1.0 kB", "12.3 MB", "500.0 TB",
    ]  # fmt: skip
