"""Unequal numbers of steps: some ranks have completed their last step, and others have begun a further one.

Every optimizer step needs all ranks. A rank that has completed its last one takes part in no further step, so a rank
that has begun a later one waits forever. The decision is based on step counts alone, not on time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from lightning_ckptless.protocol.hang_detection import Point, RankProgress


class WhyEnded(StrEnum):
    """Why a rank starts no further step, as a phrase that follows its name."""

    NO_DATA = "ran out of training data"
    ASKED = "stopped training (trainer.should_stop)"


_MOST_NAMES = 8
_FIXES = {
    WhyEnded.NO_DATA: "give every rank the same number of batches (drop_last=True, or limit_train_batches=N)",
    WhyEnded.ASKED: "decide on all ranks together, as trainer.strategy.reduce_boolean_decision() does",
}


@dataclass(frozen=True, slots=True)
class AtEnd:
    """A rank that has completed its last step.

    Args:
        step: its last optimizer step.
        why: why there is no further one.
    """

    step: int
    why: WhyEnded


def out_of_data(progress: Mapping[int, RankProgress]) -> dict[int, AtEnd]:
    """Return ranks that have completed the last step of an epoch in which another rank has begun a further step.

    Some scripts work that way: where no collective is called between two epochs, ranks may be in different epochs. The
    result explains why ranks wait for each other forever; it does not prove that they do.

    Args:
        progress: progress of the ranks.
    """
    begun = {
        (rank_progress.epoch, rank_progress.step)
        for rank_progress in progress.values()
        if rank_progress.epoch >= 0 and not rank_progress.out_of_data
    }
    return {
        rank: AtEnd(rank_progress.step, WhyEnded.NO_DATA)
        for rank, rank_progress in progress.items()
        if rank_progress.out_of_data
        and any(epoch == rank_progress.epoch and step > rank_progress.step for epoch, step in begun)
    }


_AFTER_A_RECOVERY = (
    "; this run has recovered from a fault before: if a run without faults is even, the state_dict() of the dataset or "
    "dataloader does not restore its exact position"
)


def find_uneven(
    ended: Mapping[int, AtEnd], progress: Mapping[int, RankProgress], *, has_recovered: bool = False
) -> str | None:
    """Explain which rank ended too early for the others, and how to fix it; None if all may still end alike.

    Args:
        ended: ranks that have completed their last step.
        progress: progress of the ranks, as far as it is known.
        has_recovered: whether the run has recovered from a fault, after which a dataset may be at another position.
    """
    if not ended:
        return None
    rank = min(ended, key=lambda rank: ended[rank].step)
    end = ended[rank]
    ahead = sorted(
        other
        for other, rank_progress in progress.items()
        if other not in ended
        and Point.BATCH <= rank_progress.point <= Point.OPTIMIZER
        and rank_progress.step > end.step
    )
    if not ahead:
        return None
    names = ", ".join(map(str, ahead[:_MOST_NAMES])) + (
        f" and {rest} more" if (rest := len(ahead) - _MOST_NAMES) > 0 else ""
    )
    who = f"rank {names}" if len(ahead) == 1 else f"ranks {names}"
    further = _AFTER_A_RECOVERY if has_recovered and end.why is WhyEnded.NO_DATA else ""
    return f"rank {rank} {end.why} after step {end.step}, {who} did not: {_FIXES[end.why]}{further}"
