"""One stream that a rank carries beside its own: its dataloaders, its position in them, its random numbers.

The loaders are made by the user's own `train_dataloader`, as those of a process with the stream's number would be. They
are asked for a batch at a time, under the stream's own generators, so that what it draws depends on nothing that this
rank does for itself.
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
    """A stream on a rank that has another one of its own.

    Args:
        trainer: in `fit`, with its own training data set up.
        stream: number of the stream.
        streams: how many there are.
    """

    def __init__(self, trainer: Any, stream: int, streams: int) -> None:
        self.stream = stream
        self.batch: Any = None
        self._trainer = trainer
        self._loops = FitLoops(trainer)
        self._rng: RngState = capture_rng()
        self._epoch = -1
        self._fetched = 0
        with trainer.strategy.as_stream(stream), trainer.strategy.engine.data_hooks.as_made(), self._own_rng():
            self._loader = open_training_data(trainer)
        self._require_share(streams)

    def _require_share(self, streams: int) -> None:
        """Refuse loaders that would give this rank's own share once more."""
        own = self._loops.combined_loader.flattened
        for index, loader in enumerate(self._loader.flattened):
            shares = {
                (part.rank, part.num_replicas)
                for part in sampler_parts(getattr(loader, "sampler", None) or getattr(loader, "batch_sampler", None))
                if hasattr(part, "num_replicas")
            }
            if any(loader is other for other in own) or shares != {(self.stream, streams)}:
                raise OptionsError(
                    f"training dataloader {index} cannot be opened for stream {self.stream} of {streams} on rank "
                    f"{self._trainer.global_rank}: its share of the samples does not come from Lightning's "
                    "DistributedSampler. Leave the sampler to Lightning (Trainer(use_distributed_sampler=True), a "
                    "dataset that is read by index), or start as many ranks as there are streams"
                )

    @contextmanager
    def _own_rng(self) -> Iterator[None]:
        """Draw from the stream's generators; this rank's own stay as they are."""
        outer = capture_rng()
        apply_rng(self._rng)
        try:
            yield
        finally:
            self._rng = capture_rng()
            apply_rng(outer)

    # ------------------------------------------------------------------ state

    def capture(self) -> dict[str, Any]:
        """Where the stream is, in the words of a rank's own position."""
        trackers = [tracker_of(loader) for loader in stand_ins(self._loader)]
        loaders = [tracker.position(0) if tracker else None for tracker in trackers]
        return {
            "rng": self._rng,
            "data": {"fetched": self._fetched, "buffered": 0, **place_of(self._loader), "loaders": loaders},
        }

    def move_to(self, rng: RngState, data: dict[str, Any]) -> None:
        """Go on from where the stream was.

        Args:
            rng: its generators.
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
        """Take the batch of the step that begins."""
        with self._own_rng():
            if self._epoch != self._trainer.current_epoch:
                self._begin_epoch()
            try:
                batch, _, _ = next(self._loader)
            except StopIteration as error:
                raise CkptlessError(
                    f"rank {self._trainer.global_rank}: stream {self.stream} ended after {self._fetched} batches, "
                    "before the rank's own: all ranks must have equally many"
                ) from error
            self._fetched += 1
            self.batch = to_device(self._trainer, batch)

    @contextmanager
    def at_the_wheel(self) -> Iterator[Any]:
        """The batch that was fetched, to be trained on with the stream's generators."""
        with self._own_rng():
            yield self.batch
        self.batch = None
