"""Sends data from ranks that have it to those that do not.

Usually every rank has it and nothing is sent. With an allgather, every rank would receive it from every other one: for
data that grows with the number of ranks, such as a layout, that grows with the square of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ckptless.replica.checksum import bytes_of
from lightning_ckptless.replica.transport import Transport, receive_buffer, tensor_of

_TAG = 0


def plan_broadcast(has: Sequence[bool]) -> list[list[tuple[int, int]]]:
    """Plan who sends to whom, in rounds. The number of ranks that have the data doubles with each round.

    Args:
        has: for each rank, whether it has the data.

    Returns:
        The pairs of sender and receiver of each round; no rounds if all or none have the data.
    """
    having = [rank for rank, there in enumerate(has) if there]
    lacking = [rank for rank, there in enumerate(has) if not there]
    rounds: list[list[tuple[int, int]]] = []
    while having and lacking:
        rounds.append(list(zip(having, lacking, strict=False)))
        having += lacking[: len(rounds[-1])]
        lacking = lacking[len(rounds[-1]) :]
    return rounds


def broadcast(transport: Transport, lengths: Sequence[int], mine: bytes) -> bytes:
    """Send data to the ranks that lack it. All ranks call it together.

    Args:
        transport: transport between all ranks.
        lengths: number of bytes that each rank has; 0 if it lacks the data. It is the same for all others.
        mine: the data of this rank; empty if it lacks it.

    Returns:
        The data; empty if no rank has it.

    Raises:
        TransportError: a peer is lost.
    """
    rank, length = transport.rank, max(lengths)
    for pairs in plan_broadcast([there > 0 for there in lengths]):
        received = receive_buffer(length)
        sends = [(target, _TAG, tensor_of(mine)) for source, target in pairs if source == rank]
        receives = [(source, _TAG, received) for source, target in pairs if target == rank]
        transport.exchange(sends, receives)
        mine = bytes(bytes_of(received)) if receives else mine
    return mine
