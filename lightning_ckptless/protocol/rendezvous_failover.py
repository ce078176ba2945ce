"""Where the nodes of a run meet, when the place where they met may be lost.

All nodes know the same list of places from the start, each of them on one of the nodes. The node of a place hosts it.

| Seen | Then |
|---|---|
| a place answers that was not lost | meet there |
| none answers, and none was lost | meet at the first |
| none answers, and one was lost | meet at the next in order |

A node that is started again finds the place that answers, and does not open another one where it used to host.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MeetingPlace:
    """Where to meet, and why.

    Args:
        index: of the place in the list.
        endpoint: `host:port`.
        hosts: whether this node hosts it.
        reason: why there.
    """

    index: int
    endpoint: str
    hosts: bool
    reason: str


def choose_place(
    endpoints: Sequence[str], *, own: int | None, answering: Collection[int], lost: int | None
) -> MeetingPlace:
    """Choose where to meet.

    Args:
        endpoints: all places, in the order that all nodes know.
        own: index of the place that this node hosts; None where it hosts none.
        answering: indices of the places at which somebody answers.
        lost: index of the place that was lost last; None before any was.
    """
    for index, endpoint in enumerate(endpoints):
        if index in answering and index not in (own, lost):
            return MeetingPlace(index, endpoint, False, f"{endpoint} answers")
    index = 0 if lost is None else (lost + 1) % len(endpoints)
    endpoint = endpoints[index]
    why = "no place was lost yet" if lost is None else f"{endpoints[lost]} was lost, and this is the next in order"
    return MeetingPlace(index, endpoint, index == own, f"{endpoint}: {why}")
