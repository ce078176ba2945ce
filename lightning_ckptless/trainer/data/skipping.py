"""Skipping batches: the training data continues as if its sampler had never produced them.

A skipped batch is not read, is not counted, and is not part of the length of its epoch. If no batch of the epoch is
left, those of the next epoch are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning_ckptless.internals.lightning.combined_loader import stand_ins
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.virtual_ranks import hands_over_the_iterator
from lightning_ckptless.trainer.data.loader import LoaderTracker, tracker_of


def obstacle_to_skipping(loops: FitLoops) -> str:
    """Return why batches of the training data cannot be skipped; empty if they can."""
    loaders = stand_ins(loops.combined_loader)
    if len(loaders) != 1:
        return f"there are {len(loaders)} training dataloaders, and only those of a single one can be"
    tracker = tracker_of(loaders[0])
    if tracker is None or not tracker.by_index:
        return "the training data is an iterable, or restores its own position (expected a map-style dataset)"
    if hands_over_the_iterator(loops.trainer):
        return "training_step takes an iterator of batches (dataloader_iter)"
    return ""


def skip(host_state: dict[str, Any], count_of: Callable[[int, int], int], loops: FitLoops) -> int:
    """Change a version so that the batches that follow it are skipped.

    Args:
        host_state: host state of a rank at the version, which is changed.
        count_of: returns the number of batches to skip, given those done since the start of the run and those left in
            the epoch.
        loops: loops of the trainer.

    Returns:
        Number of batches that are skipped.
    """
    position, counters = host_state["state"]["data"], host_state["state"]["counters"]
    [loader] = stand_ins(loops.combined_loader)
    [place] = position["loaders"]
    done, done_in_epoch = loops.batches_in(counters)
    length = len(loader)
    if done_in_epoch < loops.limited(length - place.skipped):
        count = count_of(done, length - place.skipped - place.yielded)
        position["loaders"] = [replace(place, skipped=place.skipped + count)]
        host_state["virtual_ranks"]["length"] = loops.limited(length - place.skipped - count)
    else:
        count = count_of(done, length)
        position["loaders"] = [replace(place, skips_next=count)]
    return count


def skips_next(loops: FitLoops) -> int:
    """Return the number of batches to skip at the start of the next epoch."""
    return max((tracker.skips_next for _, tracker in _by_index(loops)), default=0)


def begin_skipping(loops: FitLoops, count: int) -> None:
    """Skip batches at the start of the epoch that begins, also if its dataloader is new.

    Args:
        loops: loops of the trainer, with the data of the epoch.
        count: number of batches to skip.
    """
    for loader, tracker in _by_index(loops):
        tracker.skips_next = count
        _shorten(loops, loader, tracker, count)


def continue_skipping(loops: FitLoops) -> None:
    """Set the length of an epoch that is about to be continued at the position to resume."""
    for loader, tracker in _by_index(loops):
        _shorten(loops, loader, tracker, tracker.will_have_skipped)


def _by_index(loops: FitLoops) -> list[tuple[Any, LoaderTracker]]:
    if loops.combined_loader is None:
        return []
    loaders = [(loader, tracker_of(loader)) for loader in stand_ins(loops.combined_loader)]
    return [(loader, tracker) for loader, tracker in loaders if tracker is not None and tracker.by_index]


def _shorten(loops: FitLoops, loader: Any, tracker: LoaderTracker, skipped: int) -> None:
    if skipped != tracker.shortened_by:
        tracker.shortened_by = skipped
        loops.limit_batches(loops.limited(len(loader) - skipped))
