"""Numbers and ranks in the sentences of messages."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, one: str, several: str = "") -> str:
    """Return a number with its noun, such as `1 step` and `2 steps`.

    Args:
        number: the number.
        one: the noun in the singular.
        several: its plural; empty for one that is formed with an s.
    """
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def name_ranks(ranks: Sequence[int]) -> str:
    """Return ranks by number, such as `rank 1` and `ranks 1, 2`."""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks))}"
