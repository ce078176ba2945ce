"""The virtual ranks that a rank runs, and their micro-batches.

With fewer ranks, a step uses the same samples as with all of them. A rank runs the batch of its own virtual rank, then
those of its additional virtual ranks, and only the last backward pass reduces gradients over the ranks. Loss weights
turn the mean over ranks into the mean over virtual ranks (`protocol.virtual_ranks`).

All ranks run the same number of micro-batches, since a forward pass may call collectives (sharded model, `self.log`,
synchronized normalization). A rank with fewer virtual ranks repeats its own batch and discards the result, which costs
nothing: the step waits for the other ranks anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.virtual_ranks import (
    current_batch,
    hands_over_the_iterator,
    logs_kept,
    training_loss,
)
from lightning_ckptless.protocol.repartition import Repartition
from lightning_ckptless.protocol.virtual_ranks import require_world, share_of, virtual_ranks_of
from lightning_ckptless.trainer.data.virtual_rank_loader import VirtualRankLoader
from lightning_ckptless.trainer.elastic.repartition import repartition_loader
from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng

Backward = Callable[[Tensor], Any]


class VirtualRanks:
    """The virtual ranks of one trainer.

    Args:
        trainer: trainer in `fit`.
        count: number of virtual ranks, which is the number of ranks of the complete run.
        place: this rank's data-parallel index.
        places: number of data-parallel indices.
        width: number of ranks that share a data-parallel index, such as a tensor-parallel group.

    Attributes:
        count: number of virtual ranks; that of the run once a version of it is known.
        opened_for: number of virtual ranks that this rank's own dataloaders were set up for.
        is_running_another: whether the current training step is not on the rank's own batch.
        repartition: how the rest of this epoch is divided; None if each rank runs its virtual ranks.
        trainer: the trainer.
    """

    def __init__(self, trainer: Any, *, count: int, place: int, places: int, width: int) -> None:
        self.count = self.opened_for = count
        self.width = width
        self.is_running_another = False
        self.repartition: Repartition | None = None
        self.trainer = trainer
        self._own_is_repeated = False
        self._repartition_epoch = -1
        self._place = place
        self._places = places
        self._loaders: dict[int, VirtualRankLoader] = {}

    @cached_property
    def _loops(self) -> FitLoops:
        return FitLoops(self.trainer)

    @property
    def carried(self) -> tuple[int, ...]:
        """The virtual ranks that this rank runs in addition to its own."""
        return () if self.repartition is not None else virtual_ranks_of(self._place, self._places, self.count)[1:]

    @property
    def share(self) -> float:
        """Weight of a micro-batch's loss."""
        if self.repartition is not None:
            return self.repartition.weight(self._place, self._loops.fetcher.fetched - 1)
        return share_of(self._places, self.count)

    @property
    def is_padding(self) -> bool:
        """Whether the current training step only matches the collectives of other ranks and its result is discarded."""
        return self._own_is_repeated or (self.repartition is not None and self.share == 0)

    @property
    def extra_batches(self) -> int:
        """Number of micro-batches that this rank runs in a step in addition to its own."""
        if self.repartition is not None:
            return 0
        return -(-self.count // self._places) - 1

    @property
    def are_whole(self) -> bool:
        """Whether every rank runs exactly one virtual rank, its own."""
        return self.repartition is None and self.count == self._places

    def place_at(self, place: int, places: int) -> None:
        """Change this rank's data-parallel index and their number; the next version sets the virtual ranks to run."""
        self._place, self._places = place, places

    # ------------------------------------------------------------------ state

    def capture(self) -> dict[str, Any]:
        """Return the number of virtual ranks, the positions of those that this rank runs, and any repartition."""
        carried = {number: self._loader_of(number).capture() for number in self.carried}
        length = self._loops.length if self.repartition is None else self.repartition.length
        repartition = None if self.repartition is None else asdict(self.repartition)
        return {
            "count": self.count,
            "own": self._place,
            "carried": carried,
            "length": length,
            "repartition": repartition,
        }

    def open(self, saved: dict[str, Any]) -> None:
        """Apply a saved repartition; call it before the rank's own data is moved.

        Args:
            saved: the result of `capture`.

        Raises:
            OptionsError: the epoch is repartitioned and there are several training dataloaders.
        """
        self.count = saved["count"]
        self.repartition = None if saved["repartition"] is None else Repartition(**saved["repartition"])
        if self.repartition is None:
            return
        loops = self._loops
        if len(loops.combined_loader.flattened) > 1:
            raise OptionsError(
                "elastic_batch='scale' can repartition a single training dataloader, found "
                f"{len(loops.combined_loader.flattened)}: set elastic_batch='keep'"
            )
        self._repartition_epoch = self.trainer.current_epoch
        loops.combined_loader.limits = [self.repartition.steps]
        for loader in loops.combined_loader.flattened:
            repartition_loader(loader, self.repartition, self._place)

    def move_to(self, saved: dict[str, Any]) -> None:
        """Continue the additional virtual ranks from their positions; this rank's own data is already in place.

        Args:
            saved: the result of `capture`.
        """
        loops = self._loops
        if self.repartition is not None:
            loops.set_length(loops.batches_done + self.repartition.steps - loops.fetcher.fetched)
        elif saved["length"]:
            # A rank that joined alone may have assumed a different number of virtual ranks.
            loops.set_length(saved["length"])
        self._loaders = {number: loader for number, loader in self._loaders.items() if number in self.carried}
        for number, position in saved["carried"].items():
            self._loader_of(number).move_to(position["rng"], position["data"])

    def begin_epoch(self) -> None:
        """End a repartition with its epoch: from here on there are as many virtual ranks as ranks."""
        if self.repartition is not None and self.trainer.current_epoch != self._repartition_epoch:
            self.repartition, self.count = None, self._places
            self.opened_for = self.count
            self._loops.forget_training_data()

    def _loader_of(self, virtual_rank: int) -> VirtualRankLoader:
        if virtual_rank not in self._loaders:
            self._loaders[virtual_rank] = VirtualRankLoader(self.trainer, virtual_rank, self.count)
        return self._loaders[virtual_rank]

    def require(self) -> None:
        """Reject a run in which a rank would have to run several virtual ranks and cannot.

        Raises:
            WorldSizeError: names the obstacle.
        """
        if self.are_whole:
            return
        obstacle = obstacle_to_carrying(self.trainer)
        require_world(self._places, before=self._places, virtual_ranks=self.count, obstacle=obstacle)

    # ------------------------------------------------------------------ a step

    def fetch(self) -> None:
        """Fetch the additional batches for the step that begins."""
        for number in self.carried:
            self._loader_of(number).fetch()

    def run_others(self, backward: Backward, without_sync: Callable[[], Any], *, sums: bool) -> None:
        """Run the additional micro-batches, after the backward pass of the rank's own.

        Args:
            backward: runs the backward pass of a loss.
            without_sync: context in which gradients are not reduced over the ranks.
            sums: whether the last micro-batch reduces them.
        """
        carried, extra = self.carried, self.extra_batches
        self.is_running_another = True
        try:
            for number in range(extra):
                with nullcontext() if sums and number == extra - 1 else without_sync():
                    if number < len(carried):
                        self._run_virtual_rank(self._loader_of(carried[number]), backward)
                    else:
                        self._repeat_own(backward)
        finally:
            self.is_running_another = False

    def _run_virtual_rank(self, loader: VirtualRankLoader, backward: Backward) -> None:
        with loader.training() as batch, _buffers_kept(self.trainer.lightning_module):
            backward(training_loss(self.trainer, batch))

    def _repeat_own(self, backward: Backward) -> None:
        """Repeat the rank's own batch with a loss of zero, to match the collectives of other ranks."""
        generators, self._own_is_repeated = capture_rng(), True
        try:
            with _buffers_kept(self.trainer.lightning_module), logs_kept(self.trainer):
                backward(0 * training_loss(self.trainer, current_batch(self.trainer)))
        finally:
            self._own_is_repeated = False
        apply_rng(generators)


def obstacle_to_carrying(trainer: Any) -> str | None:
    """Return why a rank of this trainer cannot run more than one virtual rank; None if it can.

    Args:
        trainer: trainer with its model.
    """
    if not trainer.lightning_module.automatic_optimization:
        return "the model steps its optimizers itself (automatic_optimization=False)"
    if hands_over_the_iterator(trainer):
        return "its training_step takes an iterator of batches (dataloader_iter)"
    return None


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Undo buffer changes: only the rank's own batch may change buffers, as with one virtual rank per rank."""
    kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)
