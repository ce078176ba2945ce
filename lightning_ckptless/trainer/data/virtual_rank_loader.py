"""The training data of one additional virtual rank: its dataloaders, its position in them, its random numbers.

The loaders come from the user's `train_dataloader`, set up as on a process with the virtual rank's number. Batches are
fetched one at a time under the virtual rank's own generators, so that they do not depend on anything else this rank
does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_ckptless.errors import CkptlessError, OptionsError
from lightning_ckptless.internals.lightning.combined_loader import begin, iterators_of, place_of, set_place, stand_ins
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.virtual_ranks import open_training_data, to_device
from lightning_ckptless.trainer.data.loader import read_again, resume_at, tracker_of
from lightning_ckptless.trainer.data.sampler_replay import sampler_parts
from lightning_ckptless.trainer.state.rng import RngState, apply_rng, capture_rng


class VirtualRankLoader:
    """Training data of a virtual rank on a rank that also runs its own.

    Args:
        trainer: trainer in `fit`, with its own training data set up.
        virtual_rank: number of the virtual rank.
        count: number of virtual ranks.
    """

    def __init__(self, trainer: Any, virtual_rank: int, count: int) -> None:
        self.virtual_rank = virtual_rank
        self.batch: Any = None
        self._trainer = trainer
        self._loops = FitLoops(trainer)
        self._rng: RngState = capture_rng()
        self._epoch = -1
        self._fetched = 0
        with (
            trainer.strategy.as_virtual_rank(virtual_rank),
            trainer.strategy.engine.data.hooks.as_made(),
            self._own_rng(),
        ):
            self._loader = open_training_data(trainer)
        self._require_share(count)

    def _require_share(self, count: int) -> None:
        """Reject loaders that would return this rank's own share of the samples again."""
        own = self._loops.combined_loader.flattened
        for index, loader in enumerate(self._loader.flattened):
            shares = {
                (part.rank, part.num_replicas)
                for part in sampler_parts(getattr(loader, "sampler", None) or getattr(loader, "batch_sampler", None))
                if hasattr(part, "num_replicas")
            }
            if any(loader is other for other in own) or shares != {(self.virtual_rank, count)}:
                raise OptionsError(
                    f"training dataloader {index} cannot be opened for virtual rank {self.virtual_rank} of {count} on "
                    f"rank {self._trainer.global_rank}: its share of the samples does not come from Lightning's "
                    "DistributedSampler. Let Lightning add the sampler (Trainer(use_distributed_sampler=True), "
                    f"map-style dataset), or start {count} ranks"
                )

    @contextmanager
    def _own_rng(self) -> Iterator[None]:
        """Draw from the virtual rank's generators, and leave this rank's own unchanged."""
        outer = capture_rng()
        apply_rng(self._rng)
        try:
            yield
        finally:
            self._rng = capture_rng()
            apply_rng(outer)

    # ------------------------------------------------------------------ state

    def capture(self) -> dict[str, Any]:
        """Return the virtual rank's position in the format of a rank's own position."""
        trackers = [tracker_of(loader) for loader in stand_ins(self._loader)]
        loaders = [tracker.position(0) if tracker else None for tracker in trackers]
        return {
            "rng": self._rng,
            "data": {"fetched": self._fetched, "buffered": 0, **place_of(self._loader), "loaders": loaders},
        }

    def move_to(self, rng: RngState, data: dict[str, Any]) -> None:
        """Continue from a captured position.

        Args:
            rng: generators of the virtual rank.
            data: its position in this epoch.
        """
        index = data["index"] - data["buffered"]
        for loader, position in zip(stand_ins(self._loader), data["loaders"], strict=True):
            resume_at(loader, position)
        with self._own_rng():
            self._begin_epoch()
            for loader, iterator in zip(stand_ins(self._loader), iterators_of(self._loader), strict=False):
                if tracker_of(loader) is None:
                    read_again(iterator, index)
        set_place(self._loader, index, data["consumed"])
        self._fetched, self._rng = data["fetched"] - data["buffered"], rng

    def _begin_epoch(self) -> None:
        self._loops.set_sampler_epochs(self._loader)
        begin(self._loader)
        self._epoch, self._fetched = self._trainer.current_epoch, 0

    # ------------------------------------------------------------------ batches

    def fetch(self) -> None:
        """Fetch the batch for the step that begins."""
        with self._own_rng():
            if self._epoch != self._trainer.current_epoch:
                self._begin_epoch()
            try:
                batch, _, _ = next(self._loader)
            except StopIteration as error:
                raise CkptlessError(
                    f"rank {self._trainer.global_rank}: virtual rank {self.virtual_rank} ended after {self._fetched} "
                    "batches, before the rank's own data: all virtual ranks must have the same number of batches"
                ) from error
            self._fetched += 1
            self.batch = to_device(self._trainer, batch)

    @contextmanager
    def training(self) -> Iterator[Any]:
        """Yield the fetched batch, with the virtual rank's generators in place for training on it."""
        with self._own_rng():
            yield self.batch
        self.batch = None
