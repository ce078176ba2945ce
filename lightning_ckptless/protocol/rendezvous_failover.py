"""Rendezvous failover: which endpoint the nodes of a run use if the current one may be lost.

All nodes are started with the same list of endpoints. Each endpoint is on one of the nodes, which hosts it.

| Seen | Then |
|---|---|
| an endpoint answers that was not lost | use it |
| none answers, and none was lost | use the first |
| none answers, and one was lost | use the next in order |

A restarted node finds the endpoint that answers and does not open its own again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RendezvousEndpoint:
    """The endpoint to use and the reason for it.

    Args:
        index: index of the endpoint in the list.
        endpoint: `host:port`.
        hosts: whether this node hosts it.
        reason: why this endpoint was chosen.
    """

    index: int
    endpoint: str
    hosts: bool
    reason: str


def choose_endpoint(
    endpoints: Sequence[str], *, own: int | None, answering: Collection[int], lost: int | None
) -> RendezvousEndpoint:
    """Choose the rendezvous endpoint.

    Args:
        endpoints: all endpoints, in the same order on every node.
        own: index of the endpoint that this node hosts; None if it hosts none.
        answering: indices of the endpoints that answer.
        lost: index of the endpoint that was lost last; None if none was lost.
    """
    for index, endpoint in enumerate(endpoints):
        if index in answering and index not in (own, lost):
            return RendezvousEndpoint(index, endpoint, False, f"{endpoint} answers")
    index = 0 if lost is None else (lost + 1) % len(endpoints)
    endpoint = endpoints[index]
    why = "no endpoint was lost yet" if lost is None else f"{endpoints[lost]} was lost, and this is the next in order"
    return RendezvousEndpoint(index, endpoint, index == own, f"{endpoint}: {why}")
