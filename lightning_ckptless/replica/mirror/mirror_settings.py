"""Settings of a mirror: what a run has chosen for all of its generations."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ckptless.replica.arena import LEAST_SLOTS


@dataclass(frozen=True)
class MirrorSettings:
    """How versions are copied and verified.

    Args:
        checksum: `xxh3`, `crc32` or `none`.
        threads: number of threads that compute a checksum.
        staging: `overlap`, `blocking` to copy everything before `submit` returns, or `device` to copy it into a buffer
            on its device before that.
        slots: number of slots of each ring; those beyond two hold the history.
        history_every: optimizer steps between two versions of the history.
        verifies: whether holders fill in what their own tensors contain, and compare checksums; needs one.
    """

    checksum: str = "xxh3"
    threads: int = 1
    staging: str = "overlap"
    slots: int = LEAST_SLOTS
    history_every: int = 1
    verifies: bool = True
