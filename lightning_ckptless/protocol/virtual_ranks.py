"""Another world size: which rank goes on with what of the ranks that there were.

A run trains on *streams*: one for each rank that it began with, each with its share of the samples, its position in
them and its random numbers. While fewer ranks are there than streams, some carry several: each step they run the
micro-batch of every stream they carry, so that a step is made of the same samples as before, and no sample comes twice
or never. A rank's first stream is the one with its own number.

    4 streams on 4 ranks   0 | 1 | 2 | 3
    4 streams on 3 ranks   0, 3 | 1 | 2
    4 streams on 2 ranks   0, 2 | 1, 3

All of it is arithmetic on the numbers of ranks, so all ranks agree without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ckptless.errors import WorldSizeError


def streams_of(rank: int, world_size: int, streams: int) -> tuple[int, ...]:
    """The streams that a rank carries, its own first.

    Args:
        rank: 0 to `world_size - 1`.
        world_size: number of ranks.
        streams: number of streams, at least one for each rank.
    """
    assert 0 <= rank < world_size <= streams, (rank, world_size, streams)
    return tuple(range(rank, streams, world_size))


def carrier_of(stream: int, world_size: int) -> int:
    """The rank that carries a stream."""
    return stream % world_size


def share_of(world_size: int, streams: int) -> float:
    """What a micro-batch's loss is multiplied by, so that the mean over ranks is the mean over streams."""
    return world_size / streams


@dataclass(frozen=True, slots=True)
class RankAssignment:
    """What one rank takes over from the ranks that have written a version.

    Args:
        home: the rank whose host state it takes for its own.
        streams: the streams that it carries, each with the rank that carried it.
        sums: ranks whose running sums (logged values, metrics) it goes on with; none for a rank that is new.
    """

    home: int
    streams: dict[int, int]
    sums: tuple[int, ...]

    @property
    def sources(self) -> tuple[int, ...]:
        """The ranks whose host state it needs, in order."""
        return tuple(sorted({self.home, *self.streams.values(), *self.sums}))


def inherit(rank: int, world_size: int, *, before: int, streams: int | None, width: int = 1) -> RankAssignment:
    """What a rank takes over.

    Args:
        rank: of the new world.
        world_size: of the new world.
        before: number of ranks that have written the version.
        streams: number of streams of the version; None where the rest of the epoch is dealt, and nobody carries one.
        width: ranks that share a stream, side by side, as those of a tensor-parallel group do.
    """
    place, lane = divmod(rank, width)
    places, places_before = world_size // width, before // width

    def there(place: int) -> int:
        return place * width + lane

    carried = () if streams is None else streams_of(place, places, streams)
    return RankAssignment(
        home=there(place % places_before),
        streams={stream: there(carrier_of(stream, places_before)) for stream in carried},
        sums=tuple(there(other) for other in range(place, places_before, places)),
    )


def require_world(world_size: int, *, before: int, streams: int, obstacle: str | None) -> str:
    """Whether so many ranks can go on with a version; returns how, in a sentence.

    Args:
        world_size: number of ranks now.
        before: number of ranks that have written the version.
        streams: number of streams of the version.
        obstacle: why a rank of this program cannot carry more than one stream; None where it can.

    Raises:
        WorldSizeError: there are more ranks than streams, or a rank would have to carry two and cannot.
    """
    if world_size > streams:
        raise WorldSizeError(
            f"the version is of a run with {streams} streams of samples, {world_size} ranks are started: in the middle "
            f"of an epoch a run goes on with at most {streams}. Start as many or fewer, or begin anew from an exported "
            "checkpoint (`ckptless export`) with another run id"
        )
    if world_size < streams and obstacle is not None:
        raise WorldSizeError(
            f"{world_size} ranks are started for {streams} streams of samples, and a rank cannot carry two: "
            f"{obstacle}. Start {streams} ranks"
        )
    most = -(-streams // world_size)
    if most == 1:
        return f"the world size is {world_size}, was {before}: each rank has its own stream of samples again"
    carrying = streams - world_size * (most - 1)
    where = "each rank" if carrying == world_size else f"{carrying} of the ranks, {most - 1} on the others"
    return (
        f"the world size is {world_size}, was {before}: {streams} streams of samples, so {most} micro-batches a step "
        f"on {where}; a step is made of the same samples as before"
    )
