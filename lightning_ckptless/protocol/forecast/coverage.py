"""Which losses of nodes the replicas in memory cover, by the placement of the protocol.

A node represents its ranks: the placement keeps the shards of its ranks in the same other nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from math import ceil

from lightning_ckptless.protocol.failure_domains import domains_of, place_in
from lightning_ckptless.protocol.forecast.job import Choices, Cluster
from lightning_ckptless.protocol.placement import Placement


class Coverage:
    """Decides whether all copies of a shard were on the nodes lost since the last version.

    Args:
        cluster: nodes of the job.
        choices: copies and failure domain.
    """

    def __init__(self, cluster: Cluster, choices: Choices) -> None:
        self._nodes, self._rack_nodes, self._copies = cluster.nodes, cluster.rack_nodes, choices.copies
        self._by_rack = choices.failure_domain == "rack" and cluster.nodes > cluster.rack_nodes
        self._all = self._placement(range(cluster.nodes))

    def covers(self, lost: Collection[int], absent: Collection[int]) -> bool:
        """Whether every shard still has a copy.

        Args:
            lost: nodes that were lost since the last version.
            absent: nodes that the job was already running without.
        """
        copies = self._all.copies
        if not copies:
            return not lost
        domain_nodes = self._rack_nodes if self._by_rack else 1
        fewest = domain_nodes * (copies + 1)
        if self._nodes - len(absent) >= fewest and len({self._domain(node) for node in lost}) <= copies:
            # A shard has its copies in more domains than these.
            return True
        if not absent:
            return _has_copies(self._all, lost)
        nodes = [node for node in range(self._nodes) if node not in absent]
        place_of = {node: place for place, node in enumerate(nodes)}
        return _has_copies(self._placement(nodes), [place_of[node] for node in lost])

    def _domain(self, node: int) -> int:
        return node // self._rack_nodes if self._by_rack else node

    def _placement(self, nodes: Sequence[int]) -> Placement:
        """The placement over these nodes, with fewer copies if there are too few failure domains."""
        racks = tuple(map(self._domain, nodes)) if self._by_rack else ()
        return _placement(len(nodes), racks, self._copies)


@lru_cache(maxsize=256)
def _placement(nodes: int, racks: tuple[int, ...], copies: int) -> Placement:
    """The placement over nodes, or over their racks if they are given."""
    names = [f"node{place}" for place in range(nodes)]
    domains = domains_of("rack" if racks else "node", names, given=[f"rack{rack}" for rack in racks])
    return place_in(domains, min(copies, len(set(domains.names)) - 1))


def _has_copies(placement: Placement, lost: Collection[int]) -> bool:
    """Whether every shard has a copy outside of the lost places."""
    gone = set(lost)
    return not any(gone.issuperset(placement.holders[place]) for place in gone)


def domains_error(cluster: Cluster, choices: Choices) -> str | None:
    """Why the cluster has too few failure domains for this number of copies; None if it has enough."""
    racks = ceil(cluster.nodes / cluster.rack_nodes)
    kind, count = ("rack", racks) if choices.failure_domain == "rack" and racks > 1 else ("node", cluster.nodes)
    if not 1 < count <= choices.copies:
        return None
    return (
        f"copies={choices.copies} needs {choices.copies + 1} {kind}s (the writer's own and {choices.copies} more), but "
        f"the job has {count}: set copies={count - 1}"
    )
