"""The streams that a rank carries, and the micro-batches that it runs for those beside its own.

A step of fewer ranks is made of the same samples as one of all: a rank runs the batch of its own stream, then those of
the streams it carries, and only the last of them sums the gradients over the ranks. What each is multiplied by makes
the mean over ranks the mean over streams (`protocol.streams`).

All ranks run equally many, for a forward pass may call collectives: those of a sharded model, of `self.log`, of a norm
over the ranks. Who carries fewer streams runs its own batch once more, for nothing: the step waits for others anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.virtual_ranks import (
    batch_in_hand,
    hands_over_the_iterator,
    logs_kept,
    training_loss,
)
from lightning_ckptless.protocol.repartition import Repartition
from lightning_ckptless.protocol.virtual_ranks import require_world, share_of, streams_of
from lightning_ckptless.trainer.data.virtual_rank_loader import VirtualRankLoader
from lightning_ckptless.trainer.elastic.repartition import deal_out
from lightning_ckptless.trainer.state.rng import apply_rng, capture_rng

Backward = Callable[[Tensor], Any]


class VirtualRanks:
    """Those of one trainer.

    Args:
        trainer: in `fit`.
        count: number of streams; as many as the run has ranks when all are there.
        place: this rank's number among those that have a stream each.
        places: how many such numbers there are.
        width: ranks that share a number, as those of a tensor-parallel group do.

    Attributes:
        count: see above; that of the run, once a version of it is known.
        opened_for: number of streams that this rank's own dataloaders were set up for.
        is_running_another: whether the training step at hand is not on the rank's own batch.
        repartition: how the rest of this epoch is dealt; None where each rank runs its streams.
        trainer: see above.
    """

    def __init__(self, trainer: Any, *, count: int, place: int, places: int, width: int) -> None:
        self.count = self.opened_for = count
        self.width = width
        self.is_running_another = False
        self.repartition: Repartition | None = None
        self.trainer = trainer
        self._own_is_repeated = False
        self._dealt_in = -1
        self._place = place
        self._places = places
        self._passengers: dict[int, VirtualRankLoader] = {}

    @property
    def carried(self) -> tuple[int, ...]:
        """The streams beside this rank's own."""
        return () if self.repartition is not None else streams_of(self._place, self._places, self.count)[1:]

    @property
    def share(self) -> float:
        """What the loss of a micro-batch is multiplied by."""
        if self.repartition is not None:
            return self.repartition.weight(self._place, FitLoops(self.trainer).fetcher.fetched - 1)
        return share_of(self._places, self.count)

    @property
    def is_running_for_nothing(self) -> bool:
        """Whether the training step at hand is there to keep ranks in step, and nothing comes of it."""
        return self._own_is_repeated or (self.repartition is not None and self.share == 0)

    @property
    def extra_batches(self) -> int:
        """Micro-batches that this rank runs in a step beside its own stream's."""
        if self.repartition is not None:
            return 0
        return -(-self.count // self._places) - 1

    @property
    def are_whole(self) -> bool:
        """Whether every rank has its own stream and no other."""
        return self.repartition is None and self.count == self._places

    def place_at(self, place: int, places: int) -> None:
        """Be another of another number of ranks; what is carried is told by the next version."""
        self._place, self._places = place, places

    # ------------------------------------------------------------------ state

    def capture(self) -> dict[str, Any]:
        """How many there are, and where those are that this rank carries, or how the epoch is dealt."""
        carried = {stream: self._passenger(stream).capture() for stream in self.carried}
        length = FitLoops(self.trainer).length if self.repartition is None else self.repartition.length
        repartition = None if self.repartition is None else asdict(self.repartition)
        return {
            "count": self.count,
            "own": self._place,
            "carried": carried,
            "length": length,
            "repartition": repartition,
        }

    def open(self, saved: dict[str, Any]) -> None:
        """Before the rank's own data is moved: repartition it out, where it was dealt.

        Args:
            saved: what `capture` returned.
        """
        self.count = saved["count"]
        self.repartition = None if saved["repartition"] is None else Repartition(**saved["repartition"])
        if self.repartition is None:
            return
        loops = FitLoops(self.trainer)
        if len(loops.combined_loader.flattened) > 1:
            raise OptionsError(
                "elastic_batch='scale' deals one training dataloader; with several of them take elastic_batch='keep'"
            )
        self._dealt_in = self.trainer.current_epoch
        loops.combined_loader.limits = [self.repartition.steps]
        for loader in loops.combined_loader.flattened:
            deal_out(loader, self.repartition, self._place)

    def move_to(self, saved: dict[str, Any]) -> None:
        """Go on with the streams from where they were; this rank's own data is in place.

        Args:
            saved: what `capture` returned.
        """
        loops = FitLoops(self.trainer)
        if self.repartition is not None:
            loops.set_length(loops.batches_done + self.repartition.steps - loops.fetcher.fetched)
        elif saved["length"]:
            # A rank that came alone may have taken the run for one of as many streams as it was told to start.
            loops.set_length(saved["length"])
        self._passengers = {s: p for s, p in self._passengers.items() if s in self.carried}
        for stream, position in saved["carried"].items():
            self._passenger(stream).move_to(position["rng"], position["data"])

    def begin_epoch(self) -> None:
        """A repartition ends with its epoch: from here on there are as many streams as ranks."""
        if self.repartition is not None and self.trainer.current_epoch != self._dealt_in:
            self.repartition, self.count = None, self._places
            self.opened_for = self.count
            FitLoops(self.trainer).forget_training_data()

    def _passenger(self, stream: int) -> VirtualRankLoader:
        if stream not in self._passengers:
            self._passengers[stream] = VirtualRankLoader(self.trainer, stream, self.count)
        return self._passengers[stream]

    def require(self) -> None:
        """Refuse to begin a run in which a rank would have to carry two streams, and cannot.

        Raises:
            WorldSizeError: says why.
        """
        if self.are_whole:
            return
        obstacle = obstacle_to_carrying(self.trainer)
        require_world(self._places, before=self._places, streams=self.count, obstacle=obstacle)

    # ------------------------------------------------------------------ a step

    def fetch(self) -> None:
        """Take the batches of the step that begins."""
        for stream in self.carried:
            self._passenger(stream).fetch()

    def run_others(self, backward: Backward, without_sync: Callable[[], Any], *, sums: bool) -> None:
        """Run the micro-batches beside the own one, which has gone backward.

        Args:
            backward: goes backward from a loss.
            without_sync: context in which gradients are not summed over the ranks.
            sums: whether the last micro-batch is to sum them.
        """
        carried, extra = self.carried, self.extra_batches
        self.is_running_another = True
        try:
            for number in range(extra):
                with nullcontext() if sums and number == extra - 1 else without_sync():
                    if number < len(carried):
                        self._run_for(self._passenger(carried[number]), backward)
                    else:
                        self._run_for_nothing(backward)
        finally:
            self.is_running_another = False

    def _run_for(self, passenger: VirtualRankLoader, backward: Backward) -> None:
        with passenger.at_the_wheel() as batch, _buffers_kept(self.trainer.lightning_module):
            backward(training_loss(self.trainer, batch))

    def _run_for_nothing(self, backward: Backward) -> None:
        generators, self._own_is_repeated = capture_rng(), True
        try:
            with _buffers_kept(self.trainer.lightning_module), logs_kept(self.trainer):
                backward(0 * training_loss(self.trainer, batch_in_hand(self.trainer)))
        finally:
            self._own_is_repeated = False
        apply_rng(generators)


def obstacle_to_carrying(trainer: Any) -> str | None:
    """Why a rank of this trainer cannot run more than its own stream; None where it can.

    Args:
        trainer: with its model.
    """
    if not trainer.lightning_module.automatic_optimization:
        return "the model steps its optimizers itself (automatic_optimization=False)"
    if hands_over_the_iterator(trainer):
        return "its training_step takes an iterator of batches (dataloader_iter)"
    return None


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Have the batch of the rank's own stream alone change buffers, as it does where every rank has one."""
    kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)
