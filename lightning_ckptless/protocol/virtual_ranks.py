"""Virtual ranks: how a run continues at another world size.

A run trains on *virtual ranks*, one for each rank with which it started. Each has its share of the samples, its
position in them and its random number generators. If there are fewer ranks than virtual ranks, some ranks run several:
in each step they run the micro-batch of every one of their virtual ranks. So a step has the same samples as before, and
no sample is repeated or skipped. The first virtual rank of a rank is the one with the same number.

    4 virtual ranks on 4 ranks   0 | 1 | 2 | 3
    4 virtual ranks on 3 ranks   0, 3 | 1 | 2
    4 virtual ranks on 2 ranks   0, 2 | 1, 3

The assignment depends only on the number of ranks, so all ranks agree on it without communication.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ckptless.errors import WorldSizeError


def virtual_ranks_of(rank: int, world_size: int, virtual_ranks: int) -> tuple[int, ...]:
    """The virtual ranks that a rank runs, its own first.

    Args:
        rank: 0 to `world_size - 1`.
        world_size: number of ranks.
        virtual_ranks: number of virtual ranks, at least `world_size`.
    """
    assert 0 <= rank < world_size <= virtual_ranks, (rank, world_size, virtual_ranks)
    return tuple(range(rank, virtual_ranks, world_size))


def rank_running(virtual_rank: int, world_size: int) -> int:
    """The rank that runs a virtual rank."""
    return virtual_rank % world_size


def share_of(world_size: int, virtual_ranks: int) -> float:
    """The factor for the loss of a micro-batch that makes the mean over ranks the mean over virtual ranks."""
    return world_size / virtual_ranks


@dataclass(frozen=True, slots=True)
class RankAssignment:
    """What a rank takes over from the ranks that wrote a version.

    Args:
        home: rank whose host state it adopts.
        virtual_ranks: virtual ranks that it runs, each with the rank that ran it before.
        sums: ranks whose running sums (logged values, metrics) it merges; empty for an additional rank.
    """

    home: int
    virtual_ranks: dict[int, int]
    sums: tuple[int, ...]

    @property
    def sources(self) -> tuple[int, ...]:
        """The ranks whose host state it needs, in ascending order."""
        return tuple(sorted({self.home, *self.virtual_ranks.values(), *self.sums}))


def assign(rank: int, world_size: int, *, before: int, virtual_ranks: int | None, width: int = 1) -> RankAssignment:
    """What a rank takes over after a world change.

    Args:
        rank: rank at the new world size.
        world_size: new number of ranks.
        before: number of ranks that wrote the version.
        virtual_ranks: number of virtual ranks of the version; None if the rest of the epoch is repartitioned instead.
        width: number of consecutive ranks that share a virtual rank, as those of a tensor-parallel group do.
    """
    group, lane = divmod(rank, width)
    groups, groups_before = world_size // width, before // width

    def rank_in(group: int) -> int:
        return group * width + lane

    own = () if virtual_ranks is None else virtual_ranks_of(group, groups, virtual_ranks)
    return RankAssignment(
        home=rank_in(group % groups_before),
        virtual_ranks={virtual_rank: rank_in(rank_running(virtual_rank, groups_before)) for virtual_rank in own},
        sums=tuple(rank_in(other) for other in range(group, groups_before, groups)),
    )


def require_world(world_size: int, *, before: int, virtual_ranks: int, obstacle: str | None) -> str:
    """Check that a version can be continued at a world size; returns a description, one sentence.

    Args:
        world_size: current number of ranks.
        before: number of ranks that wrote the version.
        virtual_ranks: number of virtual ranks of the version.
        obstacle: why a rank cannot run more than one virtual rank; None if it can.

    Raises:
        WorldSizeError: there are more ranks than virtual ranks, or a rank would have to run two and cannot.
    """
    if world_size > virtual_ranks:
        raise WorldSizeError(
            f"the version has {virtual_ranks} virtual ranks, but {world_size} ranks were started: within an epoch a "
            f"run continues on at most {virtual_ranks} ranks. Start {virtual_ranks} or fewer, or start from an "
            "exported checkpoint (`ckptless export`) with another run id"
        )
    if world_size < virtual_ranks and obstacle is not None:
        raise WorldSizeError(
            f"{world_size} ranks were started for {virtual_ranks} virtual ranks, and a rank cannot run two: "
            f"{obstacle}. Start {virtual_ranks} ranks"
        )
    most = -(-virtual_ranks // world_size)
    if most == 1:
        return f"the world size is {world_size}, was {before}: each rank runs its own virtual rank again"
    with_most = virtual_ranks - world_size * (most - 1)
    where = "each rank" if with_most == world_size else f"{with_most} of the ranks, {most - 1} on the others"
    return (
        f"the world size is {world_size}, was {before}: {virtual_ranks} virtual ranks, so {most} micro-batches per "
        f"step on {where}; a step has the same samples as before"
    )
