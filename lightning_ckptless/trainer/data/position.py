"""The exact position in the training data: every loader, the order they are combined in, and prefetched batches."""

from __future__ import annotations

from typing import Any

from lightning_ckptless.internals.lightning.combined_loader import stand_ins
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.trainer.data.loader import resume_at, tracker_of
from lightning_ckptless.trainer.data.skipping import continue_skipping
from lightning_ckptless.trainer.state.changes import Changed


def data_position(loops: FitLoops) -> dict[str, Any]:
    """Return the position in the training data as plain data."""
    saved = loops.data_position()
    trackers = [tracker_of(loader) for loader in stand_ins(loops.combined_loader)]
    saved["loaders"] = [tracker.position(saved["buffered"]) if tracker else None for tracker in trackers]
    return saved


def at_the_beginning(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the position of the same dataloaders before the first batch."""
    none = [None for _ in saved["loaders"]]
    return {"fetched": 0, "buffered": 0, "index": 0, "consumed": [False for _ in saved["consumed"]], "loaders": none}


def move_data_to(loops: FitLoops, saved: dict[str, Any]) -> None:
    """Create new iterators that continue from a saved position.

    A map-style dataset is not read; an iterable one is read again from the start of its epoch. This changes the global
    generators: the caller restores them afterwards.
    """
    loaders = stand_ins(loops.combined_loader)
    for loader, position in zip(loaders, saved["loaders"], strict=True):
        resume_at(loader, position)
    continue_skipping(loops)

    def before_buffer() -> None:
        for loader, position in zip(loaders, saved["loaders"], strict=True):
            if position is not None and (tracker := tracker_of(loader)) is not None:
                tracker.before_buffer(position)

    unaware = [i for i, loader in enumerate(loaders) if tracker_of(loader) is None]
    loops.reopen_data(saved, before_buffer, unaware)
    set_attributes(loops, saved)


def set_attributes(loops: FitLoops, saved: dict[str, Any]) -> None:
    """Restore the version's dataloader attributes: drawing the sample order required earlier values."""
    apply_attributes(loops, [None if position is None else position.attributes for position in saved["loaders"]])


def attributes_now(loops: FitLoops) -> list[Changed | None]:
    """Return what has changed in each dataloader since it was created."""
    trackers = [tracker_of(loader) for loader in stand_ins(loops.combined_loader)]
    return [tracker.attributes.capture() if tracker else None for tracker in trackers]


def apply_attributes(loops: FitLoops, attributes: list[Changed | None]) -> None:
    """Restore what `attributes_now` returned."""
    for loader, changed in zip(stand_ins(loops.combined_loader), attributes, strict=True):
        if changed is not None and (tracker := tracker_of(loader)) is not None:
            tracker.attributes.apply(changed)
