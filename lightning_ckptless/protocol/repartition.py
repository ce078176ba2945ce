"""The rest of an epoch, dealt to another number of ranks: each step is made by one micro-batch of every rank there is.

The micro-batches of an epoch stand in one order, whoever runs them: by their position in the streams, and of one
position by stream. What has been run is always a beginning of it, so that a number says which, and what is left is
dealt out to the ranks in turns.

    2 streams, begun by 2 ranks   a0 b0 | a1 b1 | a2 b2 | a3 b3
    a third one comes after two   a0 b0 | a1 b1 | a2 b2 a3 | b3 - -

In the last step there may be fewer than ranks. Who has none runs another's for nothing, and the others weigh more.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ckptless.errors import WorldSizeError


@dataclass(frozen=True, slots=True)
class Repartition:
    """How the rest of an epoch is dealt.

    Args:
        streams: that the epoch was begun with.
        length: micro-batches in each of them.
        begin: micro-batches that were run before, of all streams.
        world_size: ranks that they are dealt to.
    """

    streams: int
    length: int
    begin: int
    world_size: int

    @property
    def left(self) -> int:
        """Micro-batches that are dealt out."""
        return self.streams * self.length - self.begin

    @property
    def steps(self) -> int:
        """Micro-batches that each rank runs."""
        return -(-self.left // self.world_size)

    def hand(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Stream and position of each micro-batch that a rank runs; the last may be one that it runs for nothing."""
        last = self.begin + self.left - 1
        numbers = [min(self.begin + step * self.world_size + rank, last) for step in range(self.steps)]
        return tuple((number % self.streams, number // self.streams) for number in numbers)

    def weight(self, rank: int, step: int) -> float:
        """What the loss of a rank's micro-batch is multiplied by, so that every micro-batch of the step counts alike.

        Args:
            rank: 0 to `world_size - 1`.
            step: of the repartition, from 0.
        """
        there = min(self.world_size, self.left - step * self.world_size)
        return self.world_size / there if rank < there else 0.0

    def after(self, steps: int) -> int:
        """Micro-batches of all streams that were run when the repartition has made so many steps."""
        return self.begin + min(self.left, steps * self.world_size)


def require_repartition(repartition: Repartition, *, before: int, per_step: int) -> str:
    """Whether the rest of an epoch can be dealt; returns how, in a sentence.

    Args:
        repartition: how.
        before: number of ranks that have written the version.
        per_step: micro-batches of a step so far.

    Raises:
        WorldSizeError: nobody knows how much is left.
    """
    ranks, steps = repartition.world_size, repartition.steps
    if not repartition.length:
        raise WorldSizeError(
            f"elastic_batch='scale': {ranks} ranks are started where {before} were, and the training data does not say "
            "how many batches it has: take elastic_batch='keep'"
        )
    return (
        f"the world size is {ranks}, was {before}: the {repartition.left} batches that are left of the epoch are dealt "
        f"to the ranks in {steps} steps. A step is made of {ranks} batches instead of {per_step}: what depends on it, "
        "such as the learning rate, is changed by an `on_batch_scale` hook alone"
    )
