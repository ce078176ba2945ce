"""Cores for what is read from end to end, such as a digest: how many threads a rank may take."""

from __future__ import annotations

import os

MOST_THREADS = 8
"""More were not measured."""


def threads_of_a_rank(ranks: int, *, beside_training: bool, cores: int | None = None) -> int:
    """How many threads one rank may keep busy.

    Args:
        ranks: that share the machine's cores.
        beside_training: whether half of the cores belong to others.
        cores: of the machine; None for those that this process may use.

    Returns:
        1 at least.
    """
    share = (len(os.sched_getaffinity(0)) if cores is None else cores) // ranks
    return max(1, min(MOST_THREADS, share // 2 if beside_training else share))
