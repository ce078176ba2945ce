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
from lightning_ckptless.trainer.data.loader import tracker_of


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
    length = len(loader.loader)
    if done_in_epoch < loops.limited(length - place.skipped):
        count = count_of(done, length - place.skipped - place.yielded)
        position["loaders"] = [replace(place, skipped=place.skipped + count)]
        host_state["virtual_ranks"]["length"] = loops.limited(length - place.skipped - count)
    else:
        count = count_of(done, length)
        position["loaders"] = [replace(place, skips_next=count)]
    return count


def shorten(loops: FitLoops, *, begins_epoch: bool) -> None:
    """Set the length of the epoch to what skipped batches leave of it.

    Args:
        loops: loops of the trainer.
        begins_epoch: whether the next iteration begins an epoch, rather than continuing one.
    """
    if loops.combined_loader is None:
        return
    for loader in stand_ins(loops.combined_loader):
        tracker = tracker_of(loader)
        if tracker is None or not tracker.by_index:
            continue
        skipped = tracker.skips_next if begins_epoch else tracker.will_have_skipped
        if skipped != tracker.shortened_by:
            tracker.shortened_by = skipped
            loops.limit_batches(loops.limited(len(loader.loader) - skipped))
