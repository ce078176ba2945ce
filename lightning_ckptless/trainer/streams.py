"""The streams that a rank carries, and the micro-batches that it runs for those beside its own.

A step of fewer ranks is made of the same samples as one of all: a rank runs the batch of its own stream, then those of
the streams it carries, and only the last of them sums the gradients over the ranks. What each is multiplied by makes
the mean over ranks the mean over streams (`protocol.streams`).

Ranks that must call the same collectives in every forward pass, as those of a sharded model, run equally many: who
carries fewer streams runs its own batch once more, for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ckptless.protocol.streams import share_of, streams_of
from lightning_ckptless.trainer.host.streams import batch_in_hand, hands_over_the_iterator, logs_kept, training_loss
from lightning_ckptless.trainer.passenger import Passenger
from lightning_ckptless.trainer.rng import apply_rng, capture_rng

Backward = Callable[[Tensor], Any]


class Streams:
    """Those of one trainer.

    Args:
        trainer: in `fit`.
        count: number of streams; as many as the run has ranks when all are there.
        place: this rank's number among those that have a stream each.
        places: how many such numbers there are.
        width: ranks that share a number, as those of a tensor-parallel group do.
        evenly: whether all ranks must run equally many micro-batches.

    Attributes:
        count: see above; that of the run, once a version of it is known.
        is_running_another: whether the training step at hand is not on the rank's own batch.
        is_running_for_nothing: whether it is on that batch once more, and nothing comes of it.
    """

    def __init__(self, trainer: Any, *, count: int, place: int, places: int, width: int, evenly: bool) -> None:
        self.count = count
        self.width = width
        self.is_running_another = False
        self.is_running_for_nothing = False
        self._trainer = trainer
        self._place = place
        self._places = places
        self._evenly = evenly
        self._passengers: dict[int, Passenger] = {}

    @property
    def carried(self) -> tuple[int, ...]:
        """The streams beside this rank's own."""
        return streams_of(self._place, self._places, self.count)[1:]

    @property
    def share(self) -> float:
        """What the loss of a micro-batch is multiplied by."""
        return share_of(self._places, self.count)

    @property
    def extra_batches(self) -> int:
        """Micro-batches that this rank runs in a step beside its own stream's."""
        most = -(-self.count // self._places) - 1
        return most if self._evenly else len(self.carried)

    @property
    def own(self) -> int:
        """This rank's own stream."""
        return self._place

    @property
    def are_whole(self) -> bool:
        """Whether every rank has its own stream and no other."""
        return self.count == self._places

    def place_at(self, place: int, places: int) -> None:
        """Be another of another number of ranks; what is carried is told by the next version."""
        self._place, self._places = place, places

    # ------------------------------------------------------------------ state

    def capture(self) -> dict[str, Any]:
        """How many there are, and where those are that this rank carries."""
        carried = {stream: self._passenger(stream).capture() for stream in self.carried}
        return {"count": self.count, "own": self._place, "carried": carried}

    def move_to(self, saved: dict[str, Any]) -> None:
        """Go on with the streams from where they were; this rank's own data is set up.

        Args:
            saved: what `capture` returned.
        """
        self.count = saved["count"]
        self._passengers = {s: p for s, p in self._passengers.items() if s in self.carried}
        for stream, position in saved["carried"].items():
            self._passenger(stream).move_to(position["rng"], position["data"])

    def _passenger(self, stream: int) -> Passenger:
        if stream not in self._passengers:
            self._passengers[stream] = Passenger(self._trainer, stream, self.count)
        return self._passengers[stream]

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

    def _run_for(self, passenger: Passenger, backward: Backward) -> None:
        with passenger.at_the_wheel() as batch, _buffers_kept(self._trainer.lightning_module):
            backward(training_loss(self._trainer, batch))

    def _run_for_nothing(self, backward: Backward) -> None:
        generators, self.is_running_for_nothing = capture_rng(), True
        try:
            with _buffers_kept(self._trainer.lightning_module), logs_kept(self._trainer):
                backward(0 * training_loss(self._trainer, batch_in_hand(self._trainer)))
        finally:
            self.is_running_for_nothing = False
        apply_rng(generators)


def obstacle_to_carrying(trainer: Any) -> str | None:
    """Why a rank of this trainer cannot run more than its own stream; None where it can.

    Args:
        trainer: with its model, and its training data set up.
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
