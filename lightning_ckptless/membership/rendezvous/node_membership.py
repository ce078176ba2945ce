"""A node's membership of the rendezvous, as the parts of its agent use it; `handlers.py` implements it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol


class NodeMembership(Protocol):
    """This node's membership of the rendezvous.

    Attributes:
        hosts: whether this node hosts the rendezvous.
        admits_nodes: whether nodes that were not in the last round may begin a new one.
    """

    hosts: bool
    admits_nodes: bool

    @property
    def address(self) -> str:
        """Host name or address under which other nodes reach this one."""

    def leave(self) -> None:
        """Leave the round, so that the other nodes can complete the next one without this node."""

    def spare_nodes(self) -> int:
        """How many nodes wait for a place."""

    def expel(self, places: Collection[int]) -> None:
        """Remove lost nodes from the round, by their places in the order in which the nodes joined it."""
