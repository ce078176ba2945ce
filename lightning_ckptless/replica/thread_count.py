"""The number of threads that a rank may use for bandwidth-bound work such as a checksum."""

from __future__ import annotations

import os

MOST_THREADS = 8
"""Larger numbers have not been measured."""


def threads_of_a_rank(ranks: int, *, beside_training: bool, cores: int | None = None) -> int:
    """The number of threads that a rank may keep busy.

    Args:
        ranks: number of ranks that share the cores.
        beside_training: whether training runs at the same time and needs half of the cores.
        cores: number of cores; None for those that this process may use.

    Returns:
        At least 1.
    """
    share = (len(os.sched_getaffinity(0)) if cores is None else cores) // ranks
    return max(1, min(MOST_THREADS, share // 2 if beside_training else share))
