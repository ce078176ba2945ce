"""Nouns agree with their numbers."""

from __future__ import annotations

from lightning_ckptless.protocol.wording import counted, name_ranks


def test_nouns_agree_with_their_numbers() -> None:
    assert [counted(number, "step") for number in range(3)] == ["0 steps", "1 step", "2 steps"]
    assert [counted(number, "batch", "batches") for number in (1, 2)] == ["1 batch", "2 batches"]


def test_ranks_are_named_by_number() -> None:
    assert [name_ranks(ranks) for ranks in ([1], [1, 2])] == ["rank 1", "ranks 1, 2"]
