"""Which losses of nodes the replicas in memory cover, by the placement of the protocol.

A node represents its ranks: the placement keeps the shards of its ranks in the same other nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.failure_domains import Domains, domains_of, place_in
from lightning_ckptless.protocol.forecast.job import Choices, Cluster
from lightning_ckptless.protocol.placement import Placement


class Coverage:
    """Decides whether the nodes that were lost since the last version have taken all copies of a shard.

    Args:
        cluster: nodes of the job.
        choices: copies and failure domain.

    Raises:
        OptionsError: there are too few failure domains for this number of copies.
    """

    def __init__(self, cluster: Cluster, choices: Choices) -> None:
        self._cluster, self._choices = cluster, choices
        self._by_rack = choices.failure_domain == "rack" and cluster.nodes > cluster.rack_nodes
        self._placements = dict[tuple[int, ...], Placement]()
        self._copies = place_in(self._domains(range(cluster.nodes)), choices.copies).copies

    def covers(self, lost: Collection[int], absent: Collection[int]) -> bool:
        """Whether every shard still has a copy.

        Args:
            lost: nodes that were lost since the last version.
            absent: nodes that the job was already running without.
        """
        present = self._cluster.nodes - len(absent)
        domain_nodes = self._cluster.rack_nodes if self._by_rack else 1
        if present >= domain_nodes * (self._copies + 1) and len({self._domain(node) for node in lost}) <= self._copies:
            # A shard has its copies in as many domains.
            return True
        nodes = [node for node in range(self._cluster.nodes) if node not in absent]
        return _has_copies(self._placement(nodes), nodes, lost)

    def _domain(self, node: int) -> int:
        return node // self._cluster.rack_nodes if self._by_rack else node

    def _placement(self, nodes: Sequence[int]) -> Placement:
        """The placement over these nodes, with fewer copies if there are too few failure domains."""
        # Without racks a placement depends on the number of nodes alone.
        key = tuple(map(self._domain, nodes)) if self._by_rack else (len(nodes),)
        if key not in self._placements:
            domains = self._domains(nodes)
            copies = min(self._choices.copies, max(0, len(set(domains.names)) - 1))
            self._placements[key] = place_in(domains, copies)
        return self._placements[key]

    def _domains(self, nodes: Sequence[int]) -> Domains:
        names = [f"node{place}" for place in range(len(nodes))]
        racks = [f"rack{node // self._cluster.rack_nodes}" for node in nodes]
        return domains_of(self._choices.failure_domain, names, given=racks)


def _has_copies(placement: Placement, nodes: Collection[int], lost: Collection[int]) -> bool:
    place_of = {node: place for place, node in enumerate(nodes)}
    gone = {place_of[node] for node in lost}
    return not any(gone.issuperset(placement.holders[place]) for place in gone)


def fits(cluster: Cluster, choices: Choices) -> bool:
    """Whether the cluster has enough failure domains for this number of copies."""
    try:
        Coverage(cluster, choices)
    except OptionsError:
        return False
    return True
