"""The data of one trainer: its loops, its dataloader hooks, and the virtual ranks whose samples this rank reads."""

from __future__ import annotations

from typing import Any

from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.virtual_ranks import open_training_data
from lightning_ckptless.trainer.data.hooks import DataHooks
from lightning_ckptless.trainer.data.loader import make_resumable
from lightning_ckptless.trainer.data.skipping import begin_skipping, skips_next
from lightning_ckptless.trainer.data.virtual_ranks import VirtualRanks


class TrainingData:
    """The data of one trainer in `fit`.

    Args:
        trainer: trainer in `fit`, before its data is set up.
        virtual_ranks: the virtual ranks that this rank runs.

    Attributes:
        loops: loops of the trainer.
        hooks: dataloader hooks of the trainer.
        virtual_ranks: the virtual ranks that this rank runs.
        has_moved: whether this process has changed its rank since its data was opened.
    """

    def __init__(self, trainer: Any, virtual_ranks: VirtualRanks) -> None:
        self.loops = FitLoops(trainer)
        self.hooks = DataHooks(trainer, self.loops)
        self.loops.iterate_data_through(make_resumable)
        self.virtual_ranks = virtual_ranks
        self.has_moved = False
        self._skips_next = 0
        self._trainer = trainer

    def before_setup(self) -> None:
        """Called whenever the fit loop is about to set up its training data or keep existing data."""
        self.virtual_ranks.begin_epoch()
        self._skips_next = skips_next(self.loops)

    def after_setup(self) -> None:
        """Called whenever the fit loop has set up its training data or kept existing data."""
        begin_skipping(self.loops, self._skips_next)

    def move_to(self, place: int, places: int) -> None:
        """Change this rank's data-parallel index and their number; `reopen` follows once a version is known."""
        self.has_moved = True
        self.virtual_ranks.place_at(place, places)

    def reopen(self) -> None:
        """Reopen all data after some process has changed its rank. All ranks do it."""
        self.has_moved = False
        self.loops.forget_validation_data()
        self.reopen_training_data()

    def reopen_training_data(self) -> None:
        """Reopen this rank's share of the training data; involves no other rank."""
        with self.hooks.as_made():
            self.loops.replace_training_data(open_training_data(self._trainer))
        self.virtual_ranks.opened_for = self.virtual_ranks.count
