"""Repartition the rest of an epoch over another number of ranks, with one micro-batch per rank in each step.

The micro-batches of an epoch have a fixed order, independent of the ranks that run them: by position, then by virtual
rank. The micro-batches already run are always a prefix of this order, so their number identifies them. The remaining
ones are assigned to the ranks in turn.

    2 virtual ranks on 2 ranks        a0 b0 | a1 b1 | a2 b2 | a3 b3
    a third rank joins after step 2   a0 b0 | a1 b1 | a2 b2 a3 | b3 - -

The last step may have fewer micro-batches than ranks. A rank without one runs the last micro-batch with weight 0, and
the others get a higher weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ckptless.errors import WorldSizeError


@dataclass(frozen=True, slots=True)
class Repartition:
    """A repartition of the rest of an epoch.

    Args:
        virtual_ranks: number of virtual ranks with which the epoch started.
        length: micro-batches of each virtual rank.
        begin: micro-batches that were already run, over all virtual ranks.
        world_size: number of ranks that run the rest.
    """

    virtual_ranks: int
    length: int
    begin: int
    world_size: int

    @property
    def left(self) -> int:
        """Number of remaining micro-batches."""
        return self.virtual_ranks * self.length - self.begin

    @property
    def steps(self) -> int:
        """Number of micro-batches that each rank runs."""
        return -(-self.left // self.world_size)

    def batches_of(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Virtual rank and position of each micro-batch that a rank runs; the last one may have weight 0."""
        last = self.begin + self.left - 1
        numbers = [min(self.begin + step * self.world_size + rank, last) for step in range(self.steps)]
        return tuple((number % self.virtual_ranks, number // self.virtual_ranks) for number in numbers)

    def weight(self, rank: int, step: int) -> float:
        """The factor for the loss of a rank's micro-batch, such that all micro-batches of the step count equally.

        Args:
            rank: 0 to `world_size - 1`.
            step: index of the step in the repartition, from 0.
        """
        there = min(self.world_size, self.left - step * self.world_size)
        return self.world_size / there if rank < there else 0.0

    def after(self, steps: int) -> int:
        """Number of micro-batches run, over all virtual ranks, after this many steps of the repartition."""
        return self.begin + min(self.left, steps * self.world_size)


def require_repartition(repartition: Repartition, *, before: int, per_step: int) -> str:
    """Check that the rest of an epoch can be repartitioned; returns a description, one sentence.

    Args:
        repartition: the repartition.
        before: number of ranks that wrote the version.
        per_step: micro-batches per step so far.

    Raises:
        WorldSizeError: the length of the epoch is unknown.
    """
    ranks, steps = repartition.world_size, repartition.steps
    if not repartition.length:
        raise WorldSizeError(
            f"elastic_batch='scale': the world size is {ranks}, was {before}, but the training dataloader has no "
            "length, so the rest of the epoch cannot be repartitioned: use elastic_batch='keep'"
        )
    return (
        f"the world size is {ranks}, was {before}: the {repartition.left} batches left in the epoch are repartitioned "
        f"over the ranks in {steps} steps. A step has {ranks} batches instead of {per_step}: settings that depend on "
        "that, such as the learning rate, change only if an `on_batch_scale` hook changes them"
    )
