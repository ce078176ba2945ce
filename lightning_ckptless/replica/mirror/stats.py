"""What a mirror counts and times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class MirrorStats:
    """What a mirror has done so far.

    Attributes:
        rounds: versions begun, skipped ones included.
        committed: rounds that all ranks committed.
        skipped: rounds that this rank took part in without data.
        aborted: rounds that some rank voted down.
        torn: rounds in which a tensor changed while it was copied here.
        staged_bytes: bytes of tensors copied into own slots.
        sent_bytes: bytes of tensors and host state sent to holders.
        last_stage_s: time from `submit` until the last version was copied.
        last_round_s: time from `submit` until the last round ended.
        stall_s: time that the training thread has waited here, in all.
    """

    rounds: int = 0
    committed: int = 0
    skipped: int = 0
    aborted: int = 0
    torn: int = 0
    staged_bytes: int = 0
    sent_bytes: int = 0
    last_stage_s: float = 0.0
    last_round_s: float = 0.0
    stall_s: float = 0.0
